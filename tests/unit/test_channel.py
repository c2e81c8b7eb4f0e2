"""Typed channels, and waiting for them: with a poller in plain code, with an inbox on asyncio."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import get_args

import msgspec
import pytest
import uvloop

from sgl.actors.channel import (
    EVERY_MESSAGE,
    MAX_SPIN_BACKOFF,
    Inbox,
    LocalChannel,
    PeerDiedError,
    Poller,
    Receiver,
    Sender,
    TickSender,
)
from sgl.actors.ring import RingCorruptError, RingHandle, RingReader, RingWriter
from sgl.errors import ActorDiedError
from sgl.messages import (
    Abort,
    ActorFailed,
    ActorReady,
    Chunk,
    Control,
    Drain,
    Embed,
    EngineDied,
    EngineReady,
    Finish,
    Generate,
    GetWeight,
    LogprobOptions,
    Logprobs,
    NewRow,
    NewText,
    NewTokens,
    OpenText,
    Reply,
    RowLogprobs,
    StartProfile,
    StepPlan,
    StepResult,
    Stop,
    StopProfile,
    TextDelta,
    TokenDelta,
    TokenMasks,
    UpdateWeights,
    WorkerReady,
    pack,
)
from sgl.sampling_params import SamplingParams

SAMPLING = SamplingParams(stop=("\n",), logit_bias={5: 1.5}, seed=-1)
LOGPROBS = Logprobs(values=b"\0" * 8, top_ids=pack([1, 2]))
MESSAGES = [
    Generate(1, pack([1, 2, 3]), SAMPLING, LogprobOptions(0, 2), "adapter", 3),
    Embed(2, pack([1, 2]), "tenant"),
    Abort(1),
    Control(2, "flush_cache"),
    StartProfile(3, "20260101-120000", "traces", 5, ("CPU",)),
    StopProfile(4),
    UpdateWeights(5, "/models/new", "safetensors"),
    GetWeight(6, "model.norm.weight", 100),
    StepPlan(
        7,
        admitted=[NewRow(0, 4, pack([9]), SAMPLING, seed=1 << 62)],
        decode_rows=pack([1]),
        chunks=[Chunk(0, 4, pack([8]), pack([3]), is_last=True)],
        masked=pack([1]),
    ),
    TokenMasks(7, pack([-1, 5]), pack([0, 1, 0])),
    WorkerReady(100),
    StepResult(7, pack([5]), [RowLogprobs(0, output=LOGPROBS)]),
    StepResult(8, b"", vectors=[b"\0" * 16, b""]),
    OpenText(1, ("stop", "ende")),
    NewTokens([TokenDelta(1, pack([5]), Finish("stop", matched="ende"), 3, LOGPROBS)]),
    NewTokens([TokenDelta(2, b"", Finish("length"), vector=b"\0" * 16)]),
    Stop(1),
    NewText([TextDelta(1, "größer", pack([5]), Finish("abort", message="no", status=499))]),
    Reply(2, True, "done"),
    EngineReady(1000, 500),
    ActorReady(),
    ActorFailed("no such model", is_config=True),
    Drain(0.5, 1.5),
    EngineDied("the worker 0 process ended"),
]


@contextmanager
def ring_channel(union_type: object = EVERY_MESSAGE) -> Iterator[tuple[Sender, Receiver]]:
    handle = RingHandle.create()
    writer, reader = RingWriter(handle), RingReader(handle)
    handle.close()
    try:
        yield Sender(writer), Receiver(reader, union_type)
    finally:
        writer.close()
        reader.close()


@contextmanager
def peer() -> Iterator[tuple[subprocess.Popen, int]]:
    """A process to be killed, and its pidfd."""
    with subprocess.Popen(["sleep", "60"]) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            yield process, pidfd
        finally:
            process.kill()
            os.close(pidfd)


def test_the_samples_cover_every_message():
    assert {type(message) for message in MESSAGES} == set(get_args(EVERY_MESSAGE))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_equal_to_what_was_sent(message):
    with ring_channel() as (sender, receiver):
        assert sender.send(message)
        assert receiver.receive() == [message]
    local = LocalChannel()
    assert local.sender.send(message)
    assert local.receiver.receive() == [message]


@contextmanager
def local_channel() -> Iterator[tuple[Sender, Receiver]]:
    channel = LocalChannel()
    yield channel.sender, channel.receiver


@pytest.fixture(params=[ring_channel, local_channel])
def channel(request):
    with request.param() as ends:
        yield ends


def test_messages_are_received_in_order_once_flushed(channel):
    sender, receiver = channel
    messages = [Abort(number) for number in range(100)]
    for message in messages:
        assert sender.put(message)
    assert receiver.receive() == []
    sender.flush()
    assert receiver.receive() == messages
    assert receiver.receive() == []


def test_a_large_message_keeps_its_place(channel):
    sender, receiver = channel
    messages = [Abort(1), Generate(2, bytes(4_000_000), SAMPLING), Abort(3)]
    for message in messages:
        assert sender.put(message)
    sender.flush()
    assert receiver.receive() == messages


def test_a_message_that_cannot_be_encoded_is_refused_at_once(channel):
    sender, receiver = channel
    with pytest.raises(TypeError):
        sender.put(Abort(object()))
    sender.flush()
    assert receiver.receive() == []


def test_a_message_with_a_wrong_field_is_refused_by_the_receiver(channel):
    sender, receiver = channel
    sender.send(Abort("seven"))
    with pytest.raises(RingCorruptError, match="Expected `int`, got `str`"):
        receiver.receive()


def test_a_message_of_another_channel_is_refused():
    with ring_channel(Abort | Control) as (sender, receiver):
        sender.send(Stop(1))
        with pytest.raises(RingCorruptError, match="Invalid value 'Stop'"):
            receiver.receive()


def test_bytes_that_are_no_message_are_refused():
    class Garbage:
        def drain(self) -> list[bytes]:
            return [b"\xc1 not msgpack"]

        def fileno(self) -> int:
            return -1

    with pytest.raises(RingCorruptError):
        Receiver(Garbage(), EVERY_MESSAGE).receive()


def test_a_full_channel_says_so_and_keeps_what_it_has():
    local = LocalChannel(max_messages=2)
    assert [local.sender.put(Abort(number)) for number in range(3)] == [True, True, False]
    assert not local.sender.send(Abort(4))
    assert local.receiver.receive() == [Abort(0), Abort(1)]
    assert local.sender.put(Abort(5))


def test_a_local_channel_leaves_no_descriptor_behind():
    gc.collect()
    num_open = len(os.listdir("/proc/self/fd"))
    local = LocalChannel()
    Poller([local.receiver]).wait(0.0)
    del local
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == num_open


@pytest.mark.parametrize("spin_s", [0.0, 0.0005])
def test_a_poller_says_whether_there_is_something_to_receive(channel, spin_s):
    sender, receiver = channel
    poller = Poller([receiver])
    for _ in range(5):
        assert not poller.wait(0.0, spin_s)
        assert not poller.wait(0.002, spin_s)
        sender.send(Abort(1))
        assert poller.wait(None, spin_s)
        assert poller.wait(0.0, spin_s)
        assert receiver.receive() == [Abort(1)]


def test_a_poller_waits_for_all_its_receivers_until_they_are_removed():
    channels = [LocalChannel() for _ in range(3)]
    poller = Poller(local.receiver for local in channels[:2])
    poller.add(channels[2].receiver)
    for local in channels:
        local.sender.send(Abort(1))
        assert poller.wait(0.0)
        poller.remove(local.receiver)
        assert not poller.wait(0.0)


def test_a_message_ends_a_wait_that_has_begun():
    with ring_channel() as (sender, receiver):
        timer = threading.Timer(0.02, sender.send, [Abort(1)])
        timer.start()
        assert Poller([receiver]).wait(None)
        assert receiver.receive() == [Abort(1)]
        timer.join()


def test_a_poller_stops_spinning_in_vain_and_tries_again_later():
    looks = []
    local = LocalChannel()
    poller = Poller([local.receiver])
    look = poller._look
    poller._look = lambda timeout_s: looks.append(timeout_s) or look(timeout_s)

    def spins() -> bool:
        looks.clear()
        poller.wait(0.0001, spin_s=0.00005)
        return 0.0 in looks

    attempts = [number for number in range(300) if spins()]
    gaps = [later - earlier for earlier, later in pairwise(attempts)]
    assert gaps[:4] == [2, 4, 8, 16]
    assert max(gaps) == MAX_SPIN_BACKOFF + 1
    local.sender.send(Abort(1))
    while not spins():
        pass
    assert spins()
    assert spins()


def test_what_a_peer_published_is_handed_out_before_its_death_is_told():
    with peer() as (process, pidfd):
        local = LocalChannel()
        poller = Poller([local.receiver])
        poller.watch("worker 0", pidfd)
        assert not poller.wait(0.0)
        local.sender.send(Abort(1))
        process.kill()
        process.wait()
        assert poller.wait(None)
        assert local.receiver.receive() == [Abort(1)]
        with pytest.raises(PeerDiedError, match="the worker 0 process ended") as raised:
            poller.wait(None)
        assert raised.value.name == "worker 0"
        assert isinstance(raised.value, ActorDiedError)


def test_messages_published_between_two_looks_come_before_the_death():
    with peer() as (process, pidfd):
        local = LocalChannel()
        poller = Poller([local.receiver])
        poller.watch("worker 0", pidfd)
        process.kill()
        process.wait()
        look = poller._look

        def look_then_publish(timeout_s: float | None) -> list[int]:
            ready = look(timeout_s)
            poller._look = look
            local.sender.send(Abort(1))
            return ready

        poller._look = look_then_publish
        assert poller.wait(None)
        assert local.receiver.receive() == [Abort(1)]
        with pytest.raises(PeerDiedError):
            poller.wait(None)


def test_a_death_is_told_once_and_is_not_hidden_by_busy_peers():
    with peer() as (first, first_pidfd), peer() as (second, second_pidfd):
        busy = LocalChannel()
        poller = Poller([busy.receiver])
        poller.watch("first", first_pidfd)
        poller.watch("second", second_pidfd)
        for process in (first, second):
            process.kill()
            process.wait()
        told = []
        for _ in range(4):
            busy.sender.send(Abort(1))
            try:
                assert poller.wait(None)
                assert busy.receiver.receive()
            except PeerDiedError as error:
                told.append(error.name)
        assert sorted(told) == ["first", "second"]
        assert busy.receiver.receive() == [Abort(1)] or not poller.wait(0.0)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request):
    loop = request.param()
    yield loop
    loop.close()


async def ticks(num: int = 5) -> None:
    for _ in range(num):
        await asyncio.sleep(0.001)


def fail(error: Exception) -> None:
    raise error


def test_an_inbox_tells_when_messages_are_lost(loop, channel):
    sender, receiver = channel
    failures: list[Exception] = []
    inbox = Inbox(loop, failures.append)
    inbox.add(receiver, lambda messages: 1 // 0)
    sender.send(Abort(1))
    loop.run_until_complete(ticks())
    inbox.close()
    assert [type(error) for error in failures] == [ZeroDivisionError]


def test_an_inbox_hands_out_messages_as_they_come(loop, channel):
    sender, receiver = channel
    batches: list[list[object]] = []
    inbox = Inbox(loop, fail)
    inbox.add(receiver, batches.append)
    loop.run_until_complete(ticks())
    assert batches == []
    sender.put(Abort(1))
    sender.put(Abort(2))
    sender.flush()
    loop.run_until_complete(ticks())
    sender.send(Abort(3))
    loop.run_until_complete(ticks())
    assert batches == [[Abort(1), Abort(2)], [Abort(3)]]
    inbox.remove(receiver)
    sender.send(Abort(4))
    loop.run_until_complete(ticks())
    assert len(batches) == 2
    inbox.close()


def test_an_inbox_tells_a_death_once_and_after_the_last_messages(loop):
    told: list[object] = []
    local = LocalChannel()
    with peer() as (process, pidfd):
        inbox = Inbox(loop, fail)
        inbox.watch("scheduler", pidfd, lambda error: told.append(error.name))
        inbox.add(local.receiver, told.extend)
        loop.run_until_complete(ticks())
        assert told == []
        local.sender.send(Abort(1))
        process.kill()
        process.wait()
        loop.run_until_complete(ticks())
        inbox.close()
    assert told == [Abort(1), "scheduler"]


def test_a_closed_inbox_hands_out_nothing(loop):
    told: list[object] = []
    local = LocalChannel()
    with peer() as (process, pidfd):
        inbox = Inbox(loop, fail)
        inbox.watch("scheduler", pidfd, told.append)
        inbox.add(local.receiver, told.extend)
        inbox.close()
        local.sender.send(Abort(1))
        process.kill()
        process.wait()
        loop.run_until_complete(ticks())
    assert told == []


class CountingWriter:
    """Takes `room` messages and counts how often they are published."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.bodies: list[bytes] = []
        self.num_flushes = 0

    def put(self, body: bytes) -> bool:
        if len(self.bodies) == self.room:
            return False
        self.bodies.append(body)
        return True

    def flush(self) -> None:
        self.num_flushes += 1


def test_all_messages_of_a_tick_are_published_with_one_flush(loop):
    writer = CountingWriter(room=4)
    sender = TickSender(loop, Sender(writer))
    for number in range(3):
        assert sender.put(Abort(number))
    assert writer.num_flushes == 0
    loop.run_until_complete(ticks())
    assert writer.num_flushes == 1
    assert sender.put(Abort(3))
    assert not sender.put(Abort(4))
    loop.run_until_complete(ticks())
    assert writer.num_flushes == 2
    assert [msgspec.msgpack.decode(body, type=Abort) for body in writer.bodies] == [
        Abort(number) for number in range(4)
    ]
