"""The ring between two processes: whole records in order, whatever their size and whoever dies.

The tests with two processes run this file as a program (see `main`), which forks: it has loaded
neither torch nor any thread, so that a thousand children cost seconds.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import mmap
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl.actors.channel import PeerDiedError, Poller
from sgl.actors.ring import (
    HEADER_LEN,
    MAX_INSIDE_LEN,
    RingCorruptError,
    RingHandle,
    RingReader,
    RingWriter,
)
from sgl.actors.ring_parcels import MAX_PARCELS

DEATH_NOTICE_S = 0.050


@contextmanager
def open_ring(capacity: int = 4096, **limits: int) -> Iterator[tuple[RingWriter, RingReader]]:
    with open_handle(capacity) as handle, open_ends(handle, **limits) as ends:
        yield ends


@contextmanager
def open_handle(capacity: int = 4096) -> Iterator[RingHandle]:
    handle = RingHandle.create(capacity)
    try:
        yield handle
    finally:
        handle.close()


@contextmanager
def open_ends(handle: RingHandle, **limits: int) -> Iterator[tuple[RingWriter, RingReader]]:
    writer, reader = RingWriter(handle, **limits), RingReader(handle)
    try:
        yield writer, reader
    finally:
        writer.close()
        reader.close()


def send(writer: RingWriter, *bodies: bytes) -> None:
    for body in bodies:
        assert writer.put(body)
    writer.flush()


def fill(writer: RingWriter, body: bytes) -> int:
    """How many copies of the body the ring takes."""
    num_taken = 0
    while writer.put(body):
        num_taken += 1
    writer.flush()
    return num_taken


@settings(max_examples=150, deadline=None)
@given(
    capacity=st.sampled_from([256, 264, 1000, 4096]),
    script=st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 600)),
            st.tuples(st.sampled_from(["flush", "drain"]), st.just(0)),
        ),
        max_size=80,
    ),
)
def test_the_reader_gets_exactly_what_was_published_in_order(capacity, script):
    unpublished, published = deque(), deque()
    with open_ring(capacity) as (writer, reader):
        for number, (action, size) in enumerate(script):
            if action == "put":
                body = random.Random(number).randbytes(size)
                if writer.put(body):
                    unpublished.append(body)
            elif action == "flush":
                writer.flush()
                published += unpublished
                unpublished.clear()
            else:
                assert reader.drain() == list(published)
                published.clear()
        writer.flush()
        assert reader.drain() == [*published, *unpublished]


def test_every_size_survives_at_every_distance_from_the_edge():
    capacity = 256
    for start in (0, *range(16, capacity, 8)):
        for size in range(capacity // 2):
            with open_ring(capacity) as (writer, reader):
                # records of 16 and 24 bytes lead up to the start
                send(writer, *[b""] * (start // 16 - start % 16 // 8), *[b"x"] * (start % 16 // 8))
                reader.drain()
                bodies = [bytes([size]) * size, b"after"]
                send(writer, *bodies)
                assert reader.drain() == bodies, (start, size)


def test_a_full_ring_refuses_and_loses_nothing():
    with open_ring(1000) as (writer, reader):
        bodies = [bytes([number]) * 50 for number in range(100)]
        accepted = [body for body in bodies if writer.put(body)]
        assert accepted == bodies[: len(accepted)]
        assert writer.statistics().num_refused == 100 - len(accepted) > 0
        assert reader.drain() == []
        writer.flush()
        assert reader.drain() == accepted
        send(writer, b"again")
        assert reader.drain() == [b"again"]


@pytest.mark.parametrize("size", [0, 1, 50, 80, 81, 3000])
def test_a_refused_writer_is_told_when_to_try_again(size):
    with open_ring(256) as (writer, reader):
        for _ in range(200):
            fill(writer, bytes(size))
            assert not is_readable(writer.fileno())
            assert reader.drain()
            assert is_readable(writer.fileno())


def is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def test_what_was_put_is_invisible_until_it_is_flushed():
    with open_ring() as (writer, reader):
        writer.put(b"a")
        assert not is_readable(reader.fileno())
        assert reader.drain() == []
        writer.flush()
        assert is_readable(reader.fileno())
        assert reader.drain() == [b"a"]
        assert not is_readable(reader.fileno())


def test_many_records_cost_one_wakeup():
    with open_ring(1 << 20) as (writer, reader):
        send(writer, *[b"x" * 100] * 1000)
        writer.flush()
        assert len(reader.drain()) == 1000
        statistics = reader.statistics()
        assert (statistics.num_records, statistics.num_wakeups) == (1000, 1)


def test_the_sequence_number_wraps_like_its_32_bits():
    with open_ring() as (writer, reader):
        for end in (writer, reader):
            end._num_records = (1 << 32) - 2
        writer._num_published = (1 << 32) - 2
        send(writer, b"a", b"b", b"c", bytes(100_000), b"d")
        assert reader.drain() == [b"a", b"b", b"c", bytes(100_000), b"d"]


def test_large_bodies_arrive_in_order_with_small_ones():
    rng = random.Random(1)
    sizes = [5, 3_000_000, 7, 0, MAX_INSIDE_LEN, MAX_INSIDE_LEN + 1, 9, 8_000_001, 1]
    bodies = [rng.randbytes(size) for size in sizes]
    with open_ring(1 << 20) as (writer, reader):
        for _ in range(3):
            send(writer, *bodies)
            assert reader.drain() == bodies
        assert writer.statistics().num_parcel_bytes == 0


def test_large_bodies_leave_no_descriptor_behind():
    with open_ring() as (writer, reader):
        num_open = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            send(writer, bytes(100_000), bytes(5000))
            assert len(reader.drain()) == 2
        assert len(os.listdir("/proc/self/fd")) == num_open


def test_too_many_large_bodies_are_refused_until_some_are_read():
    with open_ring(1 << 20) as (writer, reader):
        bodies = [bytes([number]) * (MAX_INSIDE_LEN + 1) for number in range(2 * MAX_PARCELS)]
        accepted = [body for body in bodies if writer.put(body)]
        assert len(accepted) == MAX_PARCELS
        assert writer.put(b"a small one still fits")
        writer.flush()
        assert reader.drain() == [*accepted, b"a small one still fits"]
        send(writer, bodies[0])
        assert reader.drain() == [bodies[0]]


def test_the_bytes_of_large_bodies_on_their_way_are_bounded():
    with open_ring(max_parcel_bytes=1_000_000) as (writer, reader):
        assert fill(writer, bytes(300_000)) == 3
        assert writer.statistics().num_parcel_bytes == 900_000
        assert reader.drain() == [bytes(300_000)] * 3
        send(writer, bytes(2_000_000))  # over the limit, but alone
        assert not writer.put(bytes(5000))
        assert reader.drain() == [bytes(2_000_000)]


def test_a_full_socket_refuses_and_loses_nothing():
    with open_ring() as (writer, reader):
        num_datagrams = 0
        with suppress(BlockingIOError):
            while True:
                writer._parcels._socket.send(b"jam", 0x40)  # MSG_DONTWAIT
                num_datagrams += 1
        assert not writer.put(bytes(5000))
        for _ in range(num_datagrams):
            reader._parcels._socket.recv(16)
        send(writer, bytes(5000))
        assert reader.drain() == [bytes(5000)]


def test_a_reader_that_is_gone_looks_like_a_full_ring():
    with open_handle() as handle:
        writer, reader = RingWriter(handle), RingReader(handle)
    reader.close()
    assert fill(writer, bytes(100)) > 0
    assert not writer.put(bytes(100_000))
    writer.close()


def test_the_statistics_add_up():
    with open_ring(4096) as (writer, reader):
        send(writer, bytes(1000), bytes(1000))
        assert writer.put(b"")
        put = writer.statistics()
        assert (put.num_records, put.num_published, put.num_refused) == (3, 2, 0)
        assert put.num_bytes_used == 2 * (1000 + HEADER_LEN) + HEADER_LEN
        reader.drain()
        read = reader.statistics()
        assert (read.num_records, read.num_bytes) == (2, 2 * (1000 + HEADER_LEN))
        assert writer.statistics().num_bytes_used == HEADER_LEN


@pytest.mark.parametrize("kind", ["inside", "parcel", "pad"])
def test_any_flipped_byte_of_a_header_is_refused(kind):
    for position in range(HEADER_LEN):
        for change in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            with open_handle(256) as handle, open_ends(handle) as (writer, reader):
                start = 0
                if kind == "pad":
                    send(writer, bytes(70), bytes(70))
                    reader.drain()
                    start = 176
                send(writer, bytes(300) if kind == "parcel" else bytes(75), b"next")
                with mmap.mmap(handle.memory_fd, 256) as memory:
                    memory[start + position] ^= change
                with pytest.raises(RingCorruptError, match=r"record [02] at byte"):
                    reader.drain()


def test_random_bytes_in_the_memory_never_crash_the_reader():
    rng = random.Random(7)
    for _ in range(300):
        with open_handle(256) as handle, open_ends(handle) as (writer, reader):
            send(writer, bytes(20), bytes(30))
            with mmap.mmap(handle.memory_fd, 256) as memory:
                memory[:64] = rng.randbytes(64)
            with pytest.raises(RingCorruptError):
                reader.drain()


def test_a_count_without_records_is_refused():
    with open_handle() as handle, open_ends(handle) as (writer, reader):
        send(writer, b"one")
        os.eventfd_write(handle.data_fd, 1)
        with pytest.raises(RingCorruptError):
            reader.drain()


def test_a_large_body_that_was_never_sent_is_refused():
    with open_handle() as handle, open_ends(handle) as (writer, reader):
        send(writer, bytes(5000))
        reader._parcels._socket.recv(16)
        with pytest.raises(RingCorruptError):
            reader.drain()


def test_a_large_body_that_is_too_short_is_refused(monkeypatch):
    monkeypatch.setattr(
        "sgl.actors.ring_parcels._write_all", lambda fd, body: os.write(fd, body[:-1])
    )
    with open_ring() as (writer, reader):
        send(writer, bytes(5000))
        with pytest.raises(RingCorruptError, match="5000 bytes ended after 4999"):
            reader.drain()


def test_the_memory_is_sealed_and_has_no_name():
    names = set(os.listdir("/dev/shm"))
    with open_handle(4096) as handle:
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(handle.memory_fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(handle.memory_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert set(os.listdir("/dev/shm")) <= names


@pytest.mark.parametrize("capacity", [0, 248, 1001])
def test_a_capacity_that_cannot_work_is_refused(capacity):
    with pytest.raises(ValueError, match=f"multiple of 8 and at least 256, got {capacity}"):
        RingHandle.create(capacity)


def test_a_handle_travels_as_numbers_to_a_process_that_inherits_its_descriptors():
    program = (
        "import json, sys; from sgl.actors.ring import RingHandle, RingWriter;"
        "writer = RingWriter(RingHandle.from_list(json.loads(sys.argv[1])));"
        "writer.put(b'hello'); writer.put(bytes(1_000_000)); writer.flush()"
    )
    with open_handle() as handle:
        command = [sys.executable, "-c", program, json.dumps(handle.to_list())]
        subprocess.run(command, pass_fds=handle.fds(), check=True)
        reader = RingReader(handle)
        assert reader.drain() == [b"hello", bytes(1_000_000)]
        reader.close()


many = pytest.param(1_000_000, marks=pytest.mark.slow)


@pytest.mark.parametrize("num_records", [20_000, many])
def test_random_records_arrive_intact_in_another_process(num_records):
    run_program("transfer", num_records)


def test_two_processes_on_one_core_make_progress():
    run_program("transfer", 20_000, "--cpu", min(os.sched_getaffinity(0)))


often = pytest.param(1000, marks=pytest.mark.slow)


@pytest.mark.parametrize("num_kills", [40, often])
@pytest.mark.parametrize("victim", ["writer", "reader"])
def test_the_survivor_of_a_kill_notices_and_sees_no_torn_record(victim, num_kills, record_property):
    outcome = run_program(f"kill-{victim}", num_kills)
    assert outcome["num_records"] > num_kills
    record_property("slowest_notice_s", outcome["max_s"])
    assert outcome["p95_s"] <= DEATH_NOTICE_S


def run_program(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Records:
    """An endless, reproducible row of bodies: 0 to 3/8 of the ring, and now and then a large one.

    Each starts with its own number, as far as its size allows.
    """

    def __init__(self, capacity: int) -> None:
        rng = random.Random(capacity)
        sizes = [rng.randrange(capacity * 3 // 8) for _ in range(2003)] + [0, 10 * capacity]
        self.fillings = [rng.randbytes(size) for size in sizes]

    def __getitem__(self, number: int) -> bytes:
        filling = self.fillings[number * 7919 % len(self.fillings)]
        return (number.to_bytes(8, "little") + filling)[: len(filling)]


def transfer(num_records: int) -> dict[str, float]:
    """Send so many records to a child that compares each."""
    handle, records = RingHandle.create(8192), Records(8192)
    child = fork(lambda: read_and_compare(RingReader(handle), records, num_records))
    writer = RingWriter(handle)
    for number in range(num_records):
        put_or_wait(writer, records[number])
        if number % 17 == 0:
            writer.flush()
    writer.flush()
    _, status = os.waitpid(child, 0)
    assert status == 0, "the reader failed"
    return {"num_records": num_records}


def read_and_compare(reader: RingReader, records: Records, num_records: int) -> None:
    poller, number = Poller([reader]), 0
    while number < num_records:
        poller.wait(None)
        number = compare(reader.drain(), records, number)
    assert number == num_records


def compare(bodies: list[bytes], records: Records, number: int) -> int:
    for body in bodies:
        assert body == records[number], f"record {number} is torn or out of order"
        number += 1
    return number


def put_or_wait(writer: RingWriter, body: bytes) -> None:
    while not writer.put(body):
        writer.flush()
        Poller([writer]).wait(None)


def fork(run: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run()
        status = 0
    finally:
        os._exit(status)


class Victim:
    """A child that is killed at a random instant, sometimes after having been stopped."""

    def __init__(self, run: Callable[[], None], rng: random.Random) -> None:
        is_running = os.eventfd(0)
        self.pid = fork(lambda: (os.eventfd_write(is_running, 1), run()))
        self.pidfd = os.pidfd_open(self.pid)
        self.rng = rng
        os.eventfd_read(is_running)
        os.close(is_running)
        self.dies_at = time.monotonic() + rng.uniform(0.0, 0.004)
        self.killed_at = 0.0

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.pidfd)
        os.waitpid(self.pid, 0)

    def remaining_s(self) -> float | None:
        """How long to wait for messages; None once it has been killed."""
        if self.killed_at:
            return None
        return max(0.0, self.dies_at - time.monotonic())

    def kill_when_due(self) -> None:
        if self.killed_at or time.monotonic() < self.dies_at:
            return
        if self.rng.random() < 0.2:
            os.kill(self.pid, signal.SIGSTOP)
            time.sleep(0.001)
            os.kill(self.pid, signal.SIGCONT)
        self.killed_at = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)


def kill_writer(records: Records, rng: random.Random) -> tuple[int, float]:
    """Read from a child until it is dead: number of records read, and seconds to the notice."""
    handle = RingHandle.create(8192)
    progress = mmap.mmap(-1, 16)  # records put before the flush, records flushed
    number = 0
    with Victim(lambda: write_for_ever(RingWriter(handle), records, progress), rng) as victim:
        reader = RingReader(handle)
        poller = Poller([reader])
        poller.watch("writer", victim.pidfd)
        try:
            while True:
                if poller.wait(victim.remaining_s()):
                    number = compare(reader.drain(), records, number)
                victim.kill_when_due()
        except PeerDiedError:
            noticed_s = time.monotonic() - victim.killed_at
    num_put, num_flushed = (int.from_bytes(progress[at : at + 8], "little") for at in (0, 8))
    assert num_flushed <= number <= num_put, (num_flushed, number, num_put)
    assert reader.drain() == []
    reader.close()
    handle.close()
    return number, noticed_s


def write_for_ever(writer: RingWriter, records: Records, progress: mmap.mmap) -> None:
    rng, number = random.Random(os.getpid()), 0
    while True:
        for _ in range(rng.randrange(1, 20)):
            if not writer.put(records[number]):
                Poller([writer]).wait(0.0001)
                break
            number += 1
        progress[0:8] = number.to_bytes(8, "little")
        writer.flush()
        progress[8:16] = number.to_bytes(8, "little")


def kill_reader(records: Records, rng: random.Random) -> tuple[int, float]:
    """Write to a child until it is dead: number of records it took, and seconds to the notice."""
    handle, number = RingHandle.create(8192), 0
    with Victim(lambda: read_and_compare(RingReader(handle), records, 1 << 60), rng) as victim:
        writer = RingWriter(handle)
        poller = Poller([writer])
        poller.watch("reader", victim.pidfd)
        try:
            while True:
                while writer.put(records[number]):
                    number += 1
                    victim.kill_when_due()
                writer.flush()
                poller.wait(victim.remaining_s())
                victim.kill_when_due()
        except PeerDiedError:
            noticed_s = time.monotonic() - victim.killed_at
    assert victim.killed_at != 0.0, "the reader ended by itself"
    writer.close()
    handle.close()
    return number, noticed_s


def kill_often(kill: Callable[[Records, random.Random], tuple[int, float]], num_kills: int) -> dict:
    records, rng = Records(8192), random.Random(num_kills)
    outcomes = [kill(records, rng) for _ in range(num_kills)]
    notices_s = [noticed_s for _, noticed_s in outcomes]
    return {
        "num_records": sum(number for number, _ in outcomes),
        "median_s": statistics.median(notices_s),
        "p95_s": statistics.quantiles(notices_s, n=20)[-1],
        "max_s": max(notices_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["transfer", "kill-writer", "kill-reader"])
    parser.add_argument("number", type=int)
    parser.add_argument("--cpu", type=int)
    arguments = parser.parse_args()
    if arguments.cpu is not None:
        os.sched_setaffinity(0, {arguments.cpu})
    match arguments.action:
        case "transfer":
            outcome = transfer(arguments.number)
        case "kill-writer":
            outcome = kill_often(kill_writer, arguments.number)
        case _:
            outcome = kill_often(kill_reader, arguments.number)
    sys.stdout.write(json.dumps(outcome))


if __name__ == "__main__":
    main()
