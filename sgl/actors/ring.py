"""A byte queue in shared memory between two processes: one writes, one reads, nobody locks.

    memory    0                                                             capacity
              │ record │ record │ record │ ... free ... │ record │ record │ pad │

    record    0         4          6           8         12          16       16+len  multiple of 8
              │ u32 len │ u16 type │ u16 flags │ u32 seq │ u32 check │ body ... │ unused │
                        check: the other three words, xored and inverted

              writer ── data eventfd:   + records published ──▶ reader
              writer ◀── credit eventfd: + bytes freed ──────── reader
              writer ── socket: large bodies, as parcels ──────▶ reader

The memory is one sealed memfd: it has no name that could be left behind, and nobody can shrink it.
Each side keeps its cursor to itself. The writer copies records into bytes it knows to be free and
adds their number to `data`; the reader takes that number, parses exactly so many records, and adds
the bytes it is done with to `credit`. No index is shared, so none can be read too early.

Memory ordering: every hand-over is a pair of system calls on one kernel object. `eventfd_write`
takes and releases the lock of the eventfd after all loads and stores its caller did before;
`eventfd_read` takes the same lock before all those its caller does next. Releasing and acquiring
one lock orders them on every architecture: a reader that sees the count sees the records, and a
writer that sees the credit overwrites bytes only after they were read. A process killed at any
instruction has therefore published whole records or nothing.

A record never wraps. Where it does not fit before the end, a pad record (not counted, with the
sequence number of the record that follows) fills the rest and it starts at 0; a rest too short for
a header is skipped by both sides. A body too long for the ring is sent as a parcel over the socket
before its record is published, so order is kept; the record's body is then the length of the other
(see ring_parcels.py).

Credit is returned in batches of a quarter of the capacity. What is held back blocks nobody: a
record takes at most 3/8 and wastes less than that before the end, which fits into the other 3/4.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from sgl.actors.ring_parcels import (
    MAX_PARCEL_BYTES,
    ParcelLostError,
    ParcelReceiver,
    ParcelSender,
)
from sgl.errors import SglError

HEADER_LEN = 16
MIN_CAPACITY = 256
MAX_INSIDE_LEN = 64 * 1024

_HEADER = struct.Struct("<IIII")  # length, kind, sequence number, check
_write_header, _read_header = _HEADER.pack_into, _HEADER.unpack_from
_INSIDE = 0x0000_0001  # the kind holds the type in its low half and the flags in its high half
_PARCEL = 0x0001_0001
_PAD = 0x0000_0002
_PARCEL_LEN = struct.Struct("<Q")  # all that is in the record of a parcel
_PARCEL_RECORD_LEN = HEADER_LEN + _PARCEL_LEN.size
_U32 = 0xFFFF_FFFF
_OVERWRITTEN = "something else than its writer wrote there"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class RingCorruptError(SglError):
    """The bytes in a ring are not what its writer can have written: the reader must not go on."""


@dataclass(frozen=True, slots=True)
class RingHandle:
    """What a process must inherit to open one end of a ring: plain numbers.

    The handle owns its descriptors. `RingWriter` and `RingReader` duplicate those they need, so
    the handle may be closed as soon as an end is open or the process that opens it has started.
    """

    memory_fd: int
    data_fd: int
    credit_fd: int
    writer_socket_fd: int
    reader_socket_fd: int
    capacity: int

    @classmethod
    def create(cls, capacity: int = 1 << 20) -> RingHandle:
        """A new, empty ring of `capacity` bytes."""
        if capacity < MIN_CAPACITY or capacity % 8:
            raise ValueError(
                f"the capacity must be a multiple of 8 and at least {MIN_CAPACITY}, got {capacity}"
            )
        memory_fd = os.memfd_create("sgl-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memory_fd, capacity)
        fcntl.fcntl(memory_fd, fcntl.F_ADD_SEALS, _SEALS)
        data_fd, credit_fd = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(memory_fd, data_fd, credit_fd, ends[0].detach(), ends[1].detach(), capacity)

    @classmethod
    def from_list(cls, numbers: Sequence[int]) -> RingHandle:
        return cls(*numbers)

    def to_list(self) -> list[int]:
        return list(astuple(self))

    def fds(self) -> tuple[int, ...]:
        return astuple(self)[:-1]

    def close(self) -> None:
        for fd in self.fds():
            os.close(fd)


@dataclass(frozen=True, slots=True)
class WriterStatistics:
    """`num_bytes_used` includes up to a quarter of the capacity that is free but not returned."""

    num_records: int
    num_published: int
    num_refused: int
    num_bytes_used: int
    num_parcel_bytes: int
    capacity: int


@dataclass(frozen=True, slots=True)
class ReaderStatistics:
    """`num_wakeups` counts the drains that found records; `num_bytes` is headers and all."""

    num_records: int
    num_wakeups: int
    num_bytes: int


class RingWriter:
    """The writing end. A record that was put is invisible to the reader until `flush`."""

    def __init__(self, handle: RingHandle, max_parcel_bytes: int = MAX_PARCEL_BYTES) -> None:
        self._memory = _map(handle, mmap.PROT_READ | mmap.PROT_WRITE)
        self._data_fd = os.dup(handle.data_fd)
        self._credit_fd = os.dup(handle.credit_fd)
        self._parcels = ParcelSender(handle.writer_socket_fd, max_parcel_bytes)
        self._capacity = handle.capacity
        self._max_inside_len = min(MAX_INSIDE_LEN, (handle.capacity * 3 // 8 & -8) - HEADER_LEN)
        self._num_written = 0  # bytes since the ring was made, as are those freed
        self._num_freed = 0
        self._num_records = 0
        self._num_published = 0
        self._num_refused = 0

    def put(self, body: bytes) -> bool:
        """Copy one record into the ring; False means that it is full and nothing was written.

        A full ring empties only as far as it was flushed.
        """
        body_len = len(body)
        record_len = (HEADER_LEN + body_len + 7) & -8
        start = self._num_written % self._capacity
        if (
            body_len > self._max_inside_len
            or start + record_len > self._capacity
            or self._num_written + record_len - self._num_freed > self._capacity
        ):
            return self._put_with_care(body, record_len)
        sequence = self._num_records & _U32
        check = body_len ^ _INSIDE ^ sequence ^ _U32
        _write_header(self._memory, start, body_len, _INSIDE, sequence, check)
        self._memory[start + HEADER_LEN : start + HEADER_LEN + body_len] = body
        self._num_written += record_len
        self._num_records += 1
        return True

    def flush(self) -> None:
        """Publish what was put since the last flush."""
        if num_new := self._num_records - self._num_published:
            os.eventfd_write(self._data_fd, num_new)
            self._num_published = self._num_records

    def fileno(self) -> int:
        """Readable once the reader has freed bytes after a `put` was refused."""
        return self._credit_fd

    def close(self) -> None:
        self._memory.close()
        self._parcels.close()
        os.close(self._data_fd)
        os.close(self._credit_fd)

    def statistics(self) -> WriterStatistics:
        self._collect_credit()
        return WriterStatistics(
            num_records=self._num_records,
            num_published=self._num_published,
            num_refused=self._num_refused,
            num_bytes_used=self._num_written - self._num_freed,
            num_parcel_bytes=self._parcels.num_bytes,
            capacity=self._capacity,
        )

    def _put_with_care(self, body: bytes, record_len: int) -> bool:
        """Put a body that is large, or does not fit before the end or into what is known free."""
        if len(body) > self._max_inside_len:
            is_put = self._put_parcel(body)
        elif is_put := self._make_room(record_len):
            self._write(body, _INSIDE)
        if not is_put:
            self._num_refused += 1
        return is_put

    def _make_room(self, record_len: int) -> bool:
        """Collect credit and move on to where the record fits; False where there is too little."""
        rest = self._capacity - self._num_written % self._capacity
        needed = record_len if record_len <= rest else rest + record_len
        if self._num_written + needed - self._num_freed > self._capacity:
            self._collect_credit()
            if self._num_written + needed - self._num_freed > self._capacity:
                return False
        if record_len > rest:
            self._skip(rest)
        return True

    def _skip(self, rest: int) -> None:
        """Leave the last bytes of the memory unused: the next record starts at 0."""
        if rest >= HEADER_LEN:
            self._write_header(rest - HEADER_LEN, _PAD)
        self._num_written += rest

    def _write(self, body: bytes, kind: int) -> None:
        body_len = len(body)
        start = self._write_header(body_len, kind) + HEADER_LEN
        self._memory[start : start + body_len] = body
        self._num_written += (HEADER_LEN + body_len + 7) & -8
        self._num_records += 1

    def _write_header(self, body_len: int, kind: int) -> int:
        start = self._num_written % self._capacity
        sequence = self._num_records & _U32
        check = body_len ^ kind ^ sequence ^ _U32
        _write_header(self._memory, start, body_len, kind, sequence, check)
        return start

    def _collect_credit(self) -> None:
        self._num_freed += _take(self._credit_fd)
        self._parcels.forget_read(self._num_freed)

    def _put_parcel(self, body: bytes) -> bool:
        self._collect_credit()
        if not (self._parcels.has_room(len(body)) and self._make_room(_PARCEL_RECORD_LEN)):
            return False
        record_end = self._num_written + _PARCEL_RECORD_LEN
        if not self._parcels.send(body, self._num_records, record_end):
            return False
        self._write(_PARCEL_LEN.pack(len(body)), _PARCEL)
        return True


class RingReader:
    """The reading end."""

    def __init__(self, handle: RingHandle) -> None:
        self._memory = _map(handle, mmap.PROT_READ)
        self._data_fd = os.dup(handle.data_fd)
        self._credit_fd = os.dup(handle.credit_fd)
        self._parcels = ParcelReceiver(handle.reader_socket_fd)
        self._capacity = handle.capacity
        self._credit_batch = handle.capacity // 4
        self._num_read = 0  # bytes since the ring was made, as are those given back
        self._num_returned = 0
        self._num_records = 0
        self._num_wakeups = 0

    def drain(self) -> list[bytes]:
        """The bodies of all records published so far; never waits.

        Raises RingCorruptError, after which the reader is of no use.
        """
        try:
            num_new = os.eventfd_read(self._data_fd)
        except BlockingIOError:
            return []
        self._num_wakeups += 1
        bodies: list[bytes] = []
        memory, capacity = self._memory, self._capacity
        for _ in range(num_new):  # a call for the usual record would cost a third more
            start = self._num_read % capacity
            body_start = start + HEADER_LEN
            if body_start <= capacity:
                body_len, kind, sequence, check = _read_header(memory, start)
                body_end = body_start + body_len
                if (
                    kind == _INSIDE
                    and sequence == self._num_records & _U32
                    and body_len ^ kind ^ sequence ^ check == _U32
                    and body_end <= capacity
                ):
                    bodies.append(memory[body_start:body_end])
                    self._num_records += 1
                    self._num_read += (HEADER_LEN + body_len + 7) & -8
                    if self._num_read - self._num_returned >= self._credit_batch:
                        self._return_credit()
                    continue
            bodies.append(self._read_with_care(start))
        return bodies

    def fileno(self) -> int:
        """Readable when there is something to drain."""
        return self._data_fd

    def close(self) -> None:
        self._memory.close()
        self._parcels.close()
        os.close(self._data_fd)
        os.close(self._credit_fd)

    def statistics(self) -> ReaderStatistics:
        return ReaderStatistics(self._num_records, self._num_wakeups, self._num_read)

    def _read_with_care(self, start: int) -> bytes:
        """The next body where that is not simply the bytes behind a sound header at `start`."""
        body_len, kind = self._header_at(start)
        if kind == _PAD:
            self._num_read += self._capacity - start
            start = 0
            body_len, kind = self._header_at(start)
        body = self._memory[start + HEADER_LEN : start + HEADER_LEN + body_len]
        if kind != _INSIDE:
            body = self._receive_parcel(start, kind, body)
        self._num_records += 1
        self._num_read += (HEADER_LEN + body_len + 7) & -8
        self._return_credit()
        return body

    def _header_at(self, start: int) -> tuple[int, int]:
        """Length and kind of the record at `start`, checked."""
        max_body_len = self._capacity - start - HEADER_LEN
        if max_body_len < 0:
            return 0, _PAD
        body_len, kind, sequence, check = _read_header(self._memory, start)
        if (
            sequence != self._num_records & _U32
            or body_len ^ kind ^ sequence ^ check != _U32
            or body_len > max_body_len
        ):
            raise self._corrupt(start)
        return body_len, kind

    def _receive_parcel(self, start: int, kind: int, record: bytes) -> bytes:
        if kind != _PARCEL or len(record) != _PARCEL_LEN.size:
            raise self._corrupt(start)
        (body_len,) = _PARCEL_LEN.unpack(record)
        try:
            return self._parcels.receive(self._num_records, body_len)
        except ParcelLostError as error:
            raise self._corrupt(start, str(error)) from None

    def _return_credit(self) -> None:
        os.eventfd_write(self._credit_fd, self._num_read - self._num_returned)
        self._num_returned = self._num_read

    def _corrupt(self, start: int, reason: str = _OVERWRITTEN) -> RingCorruptError:
        header = bytes(self._memory[start : start + HEADER_LEN]).hex(" ", 4)
        record = f"record {self._num_records} at byte {start} of a ring"
        return RingCorruptError(f"{record} has the header {header}: {reason}")


def _map(handle: RingHandle, protection: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    return mmap.mmap(handle.memory_fd, handle.capacity, flags=flags, prot=protection)


def _take(eventfd: int) -> int:
    """What was added to an eventfd since the last call."""
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0
