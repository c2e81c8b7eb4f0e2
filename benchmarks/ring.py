"""How fast are messages between two processes: our ring, Unix sockets and ZeroMQ side by side?

    this process ── put, flush ──▶ peer: sends back every message that does not start with b"s"

Each transport has one peer process; all transports take turns in every round, so that whatever else
the machine does hits them alike. Prints one JSON line per figure (the median of the rounds), a
table, and whether each bar of RELIABILITY.md holds.

Where the kernel puts the two processes moves a blocking round trip fivefold, and not the same way
for each transport: compare these at a fixed `--placement`, on one core or on two.

    python benchmarks/ring.py [--rounds 7] [--scale 1.0] [--placement free|one|two]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import uvloop
import zmq
import zmq.asyncio

from sgl.actors.channel import Poller
from sgl.actors.ring import RingHandle, RingReader, RingWriter

SPIN_S = 50e-6
SIZES = (256, 4096, 65536)
BATCH = 32
NUM_ROUND_TRIPS = {256: 2000, 4096: 1000, 65536: 300}
NUM_PUSHED = {256: 30_000, 4096: 10_000, 65536: 1500}
IDLE_S = 5.0


class Link(Protocol):
    """One process's end of a two-way connection whose arrivals a descriptor announces."""

    def put(self, body: bytes) -> None: ...
    def flush(self) -> None: ...
    def drain(self) -> list[bytes]: ...
    def fileno(self) -> int: ...


class RingLink:
    """Two rings; the arguments of the peer are the handles as JSON."""

    def __init__(self, outgoing: RingHandle, incoming: RingHandle) -> None:
        self.writer, self.reader = RingWriter(outgoing), RingReader(incoming)
        self.flush = self.writer.flush
        self.drain, self.fileno = self.reader.drain, self.reader.fileno

    def put(self, body: bytes) -> None:
        while not self.writer.put(body):
            self.writer.flush()
            wait_for(self.writer.fileno(), select.POLLIN)


class PacketLink:
    """A SOCK_SEQPACKET socket: one message, one system call."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end
        self.buffer = memoryview(bytearray(1 << 20))
        self.fileno = end.fileno

    def put(self, body: bytes) -> None:
        while True:
            try:
                self.end.send(body)
                return
            except BlockingIOError:
                wait_for(self.end.fileno(), select.POLLOUT)

    def flush(self) -> None:
        pass

    def drain(self) -> list[bytes]:
        return [body] if (body := receive(self.end, self.buffer)) else []


class StreamLink:
    """A SOCK_STREAM socket: messages behind their length, a batch in one system call."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end
        self.buffer = memoryview(bytearray(1 << 20))
        self.fileno = end.fileno
        self.unsent: list[bytes] = []
        self.arrived = b""

    def put(self, body: bytes) -> None:
        self.unsent += (struct.pack("<I", len(body)), body)

    def flush(self) -> None:
        rest = memoryview(b"".join(self.unsent))
        self.unsent.clear()
        while rest:
            try:
                rest = rest[self.end.send(rest) :]
            except BlockingIOError:
                wait_for(self.end.fileno(), select.POLLOUT)

    def drain(self) -> list[bytes]:
        self.arrived += receive(self.end, self.buffer)
        bodies, start = [], 0
        while len(self.arrived) >= start + 4:
            end = start + 4 + struct.unpack_from("<I", self.arrived, start)[0]
            if len(self.arrived) < end:
                break
            bodies.append(self.arrived[start + 4 : end])
            start = end
        self.arrived = self.arrived[start:]
        return bodies


def receive(end: socket.socket, buffer: memoryview) -> bytes:
    """What has arrived; into a buffer that is kept, as `recv` would allocate one of its size."""
    try:
        num_arrived = end.recv_into(buffer)
    except BlockingIOError:
        return b""
    if num_arrived == 0:
        raise SystemExit  # the other end is gone
    return bytes(buffer[:num_arrived])


def wait_for(fd: int, event: int) -> None:
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()


def answer(link: Link) -> None:
    replies = [body for body in link.drain() if not body.startswith(b"s")]
    for body in replies:
        link.put(body)
    link.flush()


async def serve_on_loop(link: Link) -> None:
    asyncio.get_running_loop().add_reader(link.fileno(), answer, link)
    await asyncio.Event().wait()


def serve_spinning(link: Link) -> None:
    poller = Poller([link])
    while True:
        poller.wait(None, SPIN_S)
        answer(link)


async def serve_zmq(folder: str) -> None:
    link = ZmqLink(folder, "replies", "requests")
    while True:
        for body in await link.pull.recv_multipart():
            if not body.startswith(b"s"):
                await link.push.send(body)


class ZmqLink:
    """A PUSH and a PULL socket of zmq.asyncio over ipc."""

    def __init__(self, folder: str, outgoing: str, incoming: str) -> None:
        context = zmq.asyncio.Context()
        self.push, self.pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self.push.bind(f"ipc://{folder}/{outgoing}")
        self.pull.connect(f"ipc://{folder}/{incoming}")


def open_link(kind: str, argument: str) -> Link:
    match kind:
        case "ring" | "spinning_ring":
            handles = [RingHandle.from_list(numbers) for numbers in json.loads(argument)]
            return RingLink(handles[1], handles[0])
        case "seqpacket":
            return PacketLink(socket.socket(fileno=int(argument)))
        case "stream":
            return StreamLink(socket.socket(fileno=int(argument)))
        case _:
            raise ValueError(f"no transport {kind!r}")


def serve(kind: str, argument: str, placement: str) -> None:
    place(placement, is_peer=True)
    if kind == "zmq":
        uvloop.run(serve_zmq(argument))
    elif kind == "spinning_ring":
        serve_spinning(open_link(kind, argument))
    else:
        uvloop.run(serve_on_loop(open_link(kind, argument)))


class Transport(Protocol):
    """What is measured: microseconds of round trips, and messages a second one way."""

    async def round_trips(self, body: bytes, num: int) -> list[float]: ...
    async def push(self, body: bytes, num: int, batch: int) -> float: ...


class OnLoop:
    """A link whose arrivals uvloop waits for, blocking when there are none."""

    def __init__(self, link: Link) -> None:
        self.link = link

    async def round_trips(self, body: bytes, num: int) -> list[float]:
        times: list[float] = []
        loop, link = asyncio.get_running_loop(), self.link
        done = loop.create_future()
        start = 0.0

        def ask() -> None:
            nonlocal start
            start = time.perf_counter()
            link.put(body)
            link.flush()

        def on_readable() -> None:
            if link.drain():
                times.append((time.perf_counter() - start) * 1e6)
                if len(times) < num:
                    ask()
                else:
                    done.set_result(None)

        loop.add_reader(link.fileno(), on_readable)
        ask()
        await done
        loop.remove_reader(link.fileno())
        return times

    async def push(self, body: bytes, num: int, batch: int) -> float:
        start = time.perf_counter()
        push_all(self.link, body, num, batch)
        while not self.link.drain():
            wait_for(self.link.fileno(), select.POLLIN)
        return num / (time.perf_counter() - start)


class Spinning:
    """Two rings between actors without a loop that poll for a while before they block."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.poller = Poller([link])
        self.push = OnLoop(link).push

    async def round_trips(self, body: bytes, num: int) -> list[float]:
        times = []
        for _ in range(num):
            start = time.perf_counter()
            self.link.put(body)
            self.link.flush()
            self.poller.wait(None, SPIN_S)
            self.link.drain()
            times.append((time.perf_counter() - start) * 1e6)
        return times


class OnZmq:
    def __init__(self, link: ZmqLink) -> None:
        self.link = link

    async def round_trips(self, body: bytes, num: int) -> list[float]:
        times = []
        for _ in range(num):
            start = time.perf_counter()
            await self.link.push.send(body)
            await self.link.pull.recv()
            times.append((time.perf_counter() - start) * 1e6)
        return times

    async def push(self, body: bytes, num: int, batch: int) -> float:
        start = time.perf_counter()
        for _ in range(num // batch):
            await self.link.push.send_multipart([swallowed(body)] * batch)
        await self.link.push.send(b"end")
        await self.link.pull.recv()
        return num / (time.perf_counter() - start)


def swallowed(body: bytes) -> bytes:
    return b"s" + body[1:]


def push_all(link: Link, body: bytes, num: int, batch: int) -> None:
    body = swallowed(body)
    for _ in range(num // batch):
        for _ in range(batch):
            link.put(body)
        link.flush()
    link.put(b"end")
    link.flush()


@dataclass(frozen=True)
class Contestant:
    name: str
    transport: Transport
    peer: subprocess.Popen[bytes]


def place(placement: str, *, is_peer: bool) -> None:
    """Keep this process on one core of the machine, or leave it to the kernel."""
    match placement:
        case "one":
            os.sched_setaffinity(0, {0})
        case "two":
            os.sched_setaffinity(0, {int(is_peer)})


@contextmanager
def peer(kind: str, argument: str, fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", kind, argument]
    with subprocess.Popen(command, pass_fds=fds) as process:
        try:
            yield process
        finally:
            process.kill()


def contestants(stack: ExitStack) -> list[Contestant]:
    """All transports with their peers, which are killed when the stack closes."""
    return [
        *(ring_contestant(stack, kind) for kind in ("ring", "spinning_ring")),
        socket_contestant(stack, "seqpacket", socket.SOCK_SEQPACKET),
        socket_contestant(stack, "stream", socket.SOCK_STREAM),
        zmq_contestant(stack),
    ]


def ring_contestant(stack: ExitStack, kind: str) -> Contestant:
    handles = RingHandle.create(), RingHandle.create()
    argument = json.dumps([handle.to_list() for handle in handles])
    process = stack.enter_context(peer(kind, argument, handles[0].fds() + handles[1].fds()))
    link = RingLink(handles[0], handles[1])
    return Contestant(kind, OnLoop(link) if kind == "ring" else Spinning(link), process)


def socket_contestant(stack: ExitStack, kind: str, socket_type: int) -> Contestant:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket_type)
    process = stack.enter_context(peer(kind, str(theirs.fileno()), (theirs.fileno(),)))
    theirs.close()
    link = PacketLink(ours) if kind == "seqpacket" else StreamLink(ours)
    return Contestant(kind, OnLoop(link), process)


def zmq_contestant(stack: ExitStack) -> Contestant:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    process = stack.enter_context(peer("zmq", folder))
    return Contestant("zmq", OnZmq(ZmqLink(folder, "requests", "replies")), process)


Measure = Callable[[Transport], Awaitable[list[float]]]


def figures(scale: float) -> dict[str, tuple[list[str], Measure]]:
    """What is measured in every round: a measure gives the values of the names before it."""
    found: dict[str, tuple[list[str], Measure]] = {}
    for size in SIZES:
        body = bytes(size)
        num_trips = int(NUM_ROUND_TRIPS[size] * scale)

        async def trips(t: Transport, body: bytes = body, num: int = num_trips) -> list[float]:
            times = await t.round_trips(body, num)
            percentiles = statistics.quantiles(times, n=100)
            return [percentiles[49], percentiles[98]]

        found[f"round trip {size} B"] = (["p50 us", "p99 us"], trips)
        for batch in (1, BATCH) if size == SIZES[0] else (1,):
            num_pushed = int(NUM_PUSHED[size] * scale) // BATCH * BATCH

            async def pushes(
                t: Transport, body: bytes = body, num: int = num_pushed, batch: int = batch
            ) -> list[float]:
                return [await t.push(body, num, batch)]

            found[f"throughput {size} B, batch {batch}"] = (["messages/s"], pushes)
    return found


Results = dict[tuple[str, str], dict[str, list[float]]]  # (figure, unit) -> name -> one a round


async def measure(entrants: list[Contestant], num_rounds: int, scale: float) -> Results:
    results: Results = {}
    for entrant in entrants:
        await entrant.transport.round_trips(bytes(SIZES[0]), 200)
    for round_number in range(num_rounds):
        for figure, (units, take) in figures(scale).items():
            # there and back: none always follows the same neighbour
            for entrant in entrants[::-1] if round_number % 2 else entrants:
                for unit, value in zip(units, await take(entrant.transport), strict=True):
                    of_figure = results.setdefault((figure, unit), {})
                    of_figure.setdefault(entrant.name, []).append(value)
    results["idle CPU", "%"] = idle_shares(entrants)
    return results


def idle_shares(entrants: list[Contestant]) -> dict[str, list[float]]:
    """Share of a core that each waiting peer uses."""
    time.sleep(0.5)
    start = time.perf_counter()
    before = {entrant.name: cpu_s(entrant.peer.pid) for entrant in entrants}
    time.sleep(IDLE_S)
    elapsed_s = time.perf_counter() - start
    return {e.name: [(cpu_s(e.peer.pid) - before[e.name]) / elapsed_s * 100] for e in entrants}


def cpu_s(pid: int) -> float:
    """Seconds all threads of a process have run."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def versions() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "uvloop": uvloop.__version__,
        "zmq": f"{zmq.zmq_version()} (pyzmq {zmq.__version__})",
    }


def report(results: Results, placement: str) -> None:
    about = versions() | {"placement": placement}
    for (figure, unit), values in results.items():
        for name, rounds in values.items():
            median = statistics.median(rounds)
            line: dict[str, object] = {"figure": figure, "transport": name, "unit": unit}
            line |= {"median": median, "min": min(rounds), "max": max(rounds)}
            for other in ("zmq", "seqpacket"):
                line[f"ratio to {other}"] = ratio(values, name, other)
            print(json.dumps(rounded(line | about)))
    print_table(results)


def ratio(values: dict[str, list[float]], name: str, other: str) -> float:
    """Median over the rounds of the ratio within a round: both saw the same machine."""
    return statistics.median(
        mine / theirs if theirs else 0.0
        for mine, theirs in zip(values[name], values[other], strict=True)
    )


def rounded(line: dict[str, object]) -> dict[str, object]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}


def print_table(results: Results) -> None:
    names = list(next(iter(results.values())))
    print(f"\n{'':36}" + "".join(f"{name:>15}" for name in names))
    for (figure, unit), values in results.items():
        cells = "".join(f"{statistics.median(values[name]):>15,.4g}" for name in names)
        print(f"{figure + ', ' + unit:36}{cells}")


def print_bars(results: Results) -> None:
    trips = results[f"round trip {SIZES[0]} B", "p50 us"]
    rates = results[f"throughput {SIZES[0]} B, batch {BATCH}", "messages/s"]
    idle = results["idle CPU", "%"]["ring"][0]
    unix = max(ratio(trips, "ring", name) for name in ("seqpacket", "stream"))
    bars = [
        ("p50 round trip to ZeroMQ", ratio(trips, "ring", "zmq"), "<=", 0.7),
        ("p50 round trip to the faster Unix socket", unix, "<=", 1.0),
        ("p50 round trip with spin to ZeroMQ", ratio(trips, "spinning_ring", "zmq"), "<=", 0.15),
        (f"messages/s in batches of {BATCH}", statistics.median(rates["ring"]), ">=", 250_000),
        ("idle CPU, %", idle, "<=", 0.1),
    ]
    print()
    for name, value, relation, bar in bars:
        holds = value <= bar if relation == "<=" else value >= bar
        print(f"{'holds' if holds else 'FAILS':6} {name:42} {value:,.4g} {relation} {bar:,}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of messages")
    parser.add_argument("--placement", choices=["free", "one", "two"], default="free")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "ARGUMENT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve, arguments.placement)
        return
    place(arguments.placement, is_peer=False)
    with ExitStack() as stack:
        results = uvloop.run(measure(contestants(stack), arguments.rounds, arguments.scale))
    report(results, arguments.placement)
    print_bars(results)


if __name__ == "__main__":
    main()
