"""Typed messages over rings, and waiting for them in synchronous and asyncio actors.

Sender[T] ── msgpack ──▶ RingWriter ══ shared memory ══ RingReader ──▶ Receiver[T]

          actor without an event loop                     actor on asyncio
Poller.wait: any receiver readable, or a peer died     Inbox: handlers called by the loop
Sender.put … Sender.flush, once a turn                 TickSender: one flush per loop tick
"""

from __future__ import annotations

import asyncio
import math
import os
import select
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from sgl import messages
from sgl.actors.ring import RingCorruptError
from sgl.errors import ActorDiedError

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)
T_co = TypeVar("T_co", covariant=True)

EVERY_MESSAGE = (
    messages.IngressToScheduler
    | messages.SchedulerToWorker
    | messages.WorkerToScheduler
    | messages.SchedulerToDetokenizer
    | messages.DetokenizerToScheduler
    | messages.DetokenizerToIngress
    | messages.ActorToSupervisor
    | messages.SupervisorToIngress
)

MAX_SPIN_BACKOFF = 63  # waits between two attempts at spinning, at most

_encode = msgspec.msgpack.Encoder().encode


class PeerDiedError(ActorDiedError):
    """A process this one works with has ended; all it had published has been handed out."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the {name} process ended unexpectedly")
        self.name = name


class Writer(Protocol):
    """Where a sender's bytes go: a `RingWriter`, or memory in tests."""

    def put(self, body: bytes) -> bool: ...
    def flush(self) -> None: ...


class Reader(Protocol):
    """Where a receiver's bytes come from: a `RingReader`, or memory in tests."""

    def drain(self) -> list[bytes]: ...
    def fileno(self) -> int: ...


class Readable(Protocol):
    """Anything with a descriptor to wait for: a receiver, a reader, the credit of a writer."""

    def fileno(self) -> int: ...


class Sender(Generic[T_contra]):
    """The sending end of a channel. A message that was put is seen after the next flush.

    `put` and `send` never wait: False means that the channel is full and the message was not taken.
    Whether to refuse the work behind it or to merge and keep it is for the caller to decide.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def put(self, message: T_contra) -> bool:
        return self._writer.put(_encode(message))

    def flush(self) -> None:
        self._writer.flush()

    def send(self, message: T_contra) -> bool:
        is_put = self.put(message)
        self.flush()
        return is_put


class Receiver(Generic[T_co]):
    """The receiving end of a channel whose messages are of `union_type`, the run-time form of T."""

    def __init__(self, reader: Reader, union_type: Any) -> None:
        self._reader = reader
        self._decode = msgspec.msgpack.Decoder(union_type).decode

    def receive(self) -> list[T_co]:
        """All messages published so far, in order; never waits."""
        try:
            return [self._decode(body) for body in self._reader.drain()]
        except msgspec.DecodeError as error:
            raise RingCorruptError(f"a message does not have its sender's type: {error}") from error

    def fileno(self) -> int:
        """Readable when there is something to receive."""
        return self._reader.fileno()


class LocalChannel(Generic[T]):
    """Both ends of a channel inside one process, for tests: the messages really are encoded.

    max_messages   how many may wait before `put` answers False; None: any number
    """

    def __init__(self, union_type: Any = EVERY_MESSAGE, max_messages: int | None = None) -> None:
        memory = _LocalMemory(max_messages)
        self.sender: Sender[T] = Sender(memory)
        self.receiver: Receiver[T] = Receiver(memory, union_type)


class _LocalMemory:
    """Writer and reader at once."""

    def __init__(self, max_messages: int | None) -> None:
        self._max_messages = math.inf if max_messages is None else max_messages
        self._bodies: deque[bytes] = deque()
        self._num_published = 0
        self._event_fd: int | None = None

    def put(self, body: bytes) -> bool:
        if len(self._bodies) >= self._max_messages:
            return False
        self._bodies.append(body)
        return True

    def flush(self) -> None:
        self._num_published = len(self._bodies)
        self._signal()

    def drain(self) -> list[bytes]:
        drained = [self._bodies.popleft() for _ in range(self._num_published)]
        self._num_published = 0
        if drained and self._event_fd is not None:
            os.eventfd_read(self._event_fd)
        return drained

    def fileno(self) -> int:
        if self._event_fd is None:
            self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            weakref.finalize(self, os.close, self._event_fd)
            self._signal()
        return self._event_fd

    def _signal(self) -> None:
        if self._num_published and self._event_fd is not None:
            os.eventfd_write(self._event_fd, 1)


class Poller:
    """Waits, in an actor without an event loop, for messages and for the death of peers."""

    def __init__(self, sources: Iterable[Readable] = ()) -> None:
        self._poll = select.poll()
        self._peers: dict[int, str] = {}  # pidfd -> name
        self._dead: deque[str] = deque()  # seen to have ended, not yet told
        self._num_waits_unspun = 0
        self._spin_backoff = 0
        for source in sources:
            self.add(source)

    def add(self, source: Readable) -> None:
        self._poll.register(source.fileno(), select.POLLIN)

    def remove(self, source: Readable) -> None:
        self._poll.unregister(source.fileno())

    def watch(self, name: str, pidfd: int) -> None:
        """Let `wait` raise PeerDiedError when this process has ended: once, then forget it."""
        self._peers[pidfd] = name
        self._poll.register(pidfd, select.POLLIN)

    def wait(self, timeout_s: float | None, spin_s: float = 0.0) -> bool:
        """Whether a source is readable, after waiting for it up to `timeout_s` (None: for ever).

        The first `spin_s` of the wait are spent polling, as long as that pays: lower latency for
        a busy core.
        After True the caller must receive from every receiver. What a peer published before it
        died is then handed out, and the next call raises, however much other peers still send.
        """
        if not self._dead:
            ready = self._spin(timeout_s, spin_s) or self._look(timeout_s)
            if not self._bury(ready):
                return bool(ready)
            # the last records of a peer may have come between the looks at its ring and its pidfd
            if any(fd not in self._peers for fd in self._look(0.0)):
                return True
        raise PeerDiedError(self._dead.popleft())

    def _look(self, timeout_s: float | None) -> list[int]:
        timeout_ms = None if timeout_s is None else timeout_s * 1000
        return [fd for fd, _ in self._poll.poll(timeout_ms)]

    def _spin(self, timeout_s: float | None, spin_s: float) -> list[int]:
        """Poll without blocking, unless that was in vain lately.

        When the peer shares our core it can only answer once we block, and a quiet channel is not
        worth a busy core: after each failure twice as many waits pass before the next attempt.
        """
        if spin_s <= 0.0 or self._num_waits_unspun > 0:
            self._num_waits_unspun -= 1
            return []
        deadline = time.monotonic() + min(spin_s, math.inf if timeout_s is None else timeout_s)
        while not (ready := self._look(0.0)) and time.monotonic() < deadline:
            pass
        self._spin_backoff = 0 if ready else min(2 * self._spin_backoff + 1, MAX_SPIN_BACKOFF)
        self._num_waits_unspun = self._spin_backoff
        return ready

    def _bury(self, ready: list[int]) -> bool:
        """Note the peers among the readable descriptors as dead; False if there are none."""
        ended = [fd for fd in ready if fd in self._peers]
        for fd in ended:
            self._poll.unregister(fd)
            self._dead.append(self._peers.pop(fd))
        return bool(ended)


class Inbox:
    """Lets an asyncio loop hand out messages and the death of peers.

    fail   called with the exception of a handler, or with a RingCorruptError: messages are lost, so
           whoever waits for them would wait for ever
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, fail: Callable[[Exception], None]) -> None:
        self._loop = loop
        self._fail = fail
        self._deliveries: dict[int, Callable[[], None]] = {}
        self._pidfds: set[int] = set()

    def add(self, receiver: Receiver[T], handle: Callable[[list[T]], None]) -> None:
        """Call `handle` with all new messages whenever there are some."""
        deliver = partial(self._deliver, receiver, handle)
        self._deliveries[receiver.fileno()] = deliver
        self._loop.add_reader(receiver.fileno(), deliver)

    def remove(self, receiver: Receiver[Any]) -> None:
        del self._deliveries[receiver.fileno()]
        self._loop.remove_reader(receiver.fileno())

    def watch(self, name: str, pidfd: int, handle: Callable[[PeerDiedError], None]) -> None:
        """Call `handle` once when this process has ended, after its last messages."""
        self._pidfds.add(pidfd)
        self._loop.add_reader(pidfd, self._tell, name, pidfd, handle)

    def close(self) -> None:
        """Hand out nothing from now on."""
        for fd in (*self._deliveries, *self._pidfds):
            self._loop.remove_reader(fd)
        self._deliveries.clear()
        self._pidfds.clear()

    def _deliver(self, receiver: Receiver[T], handle: Callable[[list[T]], None]) -> None:
        try:
            if received := receiver.receive():
                handle(received)
        except Exception as error:  # the outermost loop of what an actor hears
            self._fail(error)

    def _tell(self, name: str, pidfd: int, handle: Callable[[PeerDiedError], None]) -> None:
        self._pidfds.remove(pidfd)
        self._loop.remove_reader(pidfd)
        for deliver in list(self._deliveries.values()):
            deliver()
        handle(PeerDiedError(name))


class TickSender(Generic[T_contra]):
    """A sender on an asyncio loop: all messages put in one tick are published at its end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sender: Sender[T_contra]) -> None:
        self._loop = loop
        self._sender = sender
        self._is_flush_due = False

    def put(self, message: T_contra) -> bool:
        """As `Sender.put`; the flush comes by itself."""
        is_put = self._sender.put(message)
        if is_put and not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)
        return is_put

    def _flush(self) -> None:
        self._is_flush_due = False
        self._sender.flush()
