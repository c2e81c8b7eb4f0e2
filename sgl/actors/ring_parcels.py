"""Bodies too long for a ring: each in a memfd of its own, handed over through a socket.

    sender ── label, descriptor of the memfd ──▶ socket ──▶ receiver: reads the memfd, closes it

    label     number of the record that announces the body, length of the body

A parcel is sent before its record is published, and received when the reader meets that record. So
parcels come in the order of their records, and the reader never waits for one. A descriptor on its
way is held by the socket alone: once the ends are closed, nothing is left of the body.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import deque

from sgl.errors import SglError

MAX_PARCELS = 64
MAX_PARCEL_BYTES = 256 * 1024 * 1024

_LABEL = struct.Struct("<QQ")
_DESCRIPTOR = struct.Struct("=i")
_READER_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED)


class ParcelLostError(SglError):
    """What came through the socket is not the body that was announced."""


class ParcelSender:
    """The writer's end. How many parcels are on their way, and how many bytes, is bounded."""

    def __init__(self, socket_fd: int, max_bytes: int) -> None:
        self._socket = socket.socket(fileno=os.dup(socket_fd))
        self._max_bytes = max_bytes
        self._on_their_way: deque[tuple[int, int]] = deque()  # end of the record, length of body
        self.num_bytes = 0

    def has_room(self, body_len: int) -> bool:
        """A body over the limit may travel alone: every message can be sent."""
        return not self._on_their_way or (
            len(self._on_their_way) < MAX_PARCELS and self.num_bytes + body_len <= self._max_bytes
        )

    def send(self, body: bytes, record: int, record_end: int) -> bool:
        """Send the body of the record that will end at byte `record_end`; False if it cannot be.

        False passes: the queue of the socket, or of descriptors in flight, is at its limit. A
        reader that is gone looks like one that is slow; who watches its pidfd learns more.
        """
        fd = os.memfd_create("sgl-body", os.MFD_CLOEXEC)
        try:
            _write_all(fd, body)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(fd))
            label = _LABEL.pack(record, len(body))
            self._socket.sendmsg([label], [rights], socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ETOOMANYREFS, *_READER_GONE):
                return False
            raise
        finally:
            os.close(fd)
        self._on_their_way.append((record_end, len(body)))
        self.num_bytes += len(body)
        return True

    def forget_read(self, num_freed: int) -> None:
        """The reader has freed the records before this byte: it has their bodies."""
        while self._on_their_way and self._on_their_way[0][0] <= num_freed:
            _, body_len = self._on_their_way.popleft()
            self.num_bytes -= body_len

    def close(self) -> None:
        self._socket.close()


class ParcelReceiver:
    """The reader's end."""

    def __init__(self, socket_fd: int) -> None:
        self._socket = socket.socket(fileno=os.dup(socket_fd))

    def receive(self, record: int, body_len: int) -> bytes:
        """The body that this record announces. Raises ParcelLostError where another one came."""
        fd = self._receive_descriptor(_LABEL.pack(record, body_len))
        try:
            return _read_all(fd, body_len)
        finally:
            os.close(fd)

    def close(self) -> None:
        self._socket.close()

    def _receive_descriptor(self, expected_label: bytes) -> int:
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            label, ancillary, _, _ = self._socket.recvmsg(
                _LABEL.size, socket.CMSG_LEN(_DESCRIPTOR.size), flags
            )
        except BlockingIOError:
            raise ParcelLostError("its large body was never sent") from None
        if label != expected_label:
            raise ParcelLostError(f"a body came in its place, with the label {label.hex(' ', 8)!r}")
        if not ancillary:
            raise OSError(errno.EMFILE, "no descriptor left for a large message: raise `ulimit -n`")
        (fd,) = _DESCRIPTOR.unpack(ancillary[0][2])
        return int(fd)


def _write_all(fd: int, body: bytes) -> None:
    rest = memoryview(body)
    while rest:  # one call writes at most 2 GiB
        rest = rest[os.write(fd, rest) :]


def _read_all(fd: int, body_len: int) -> bytes:
    parts: list[bytes] = []
    num_read = 0
    while num_read < body_len:
        parts.append(part := os.pread(fd, body_len - num_read, num_read))
        if not part:
            raise ParcelLostError(f"its large body of {body_len} bytes ended after {num_read}")
        num_read += len(part)
    return b"".join(parts)
