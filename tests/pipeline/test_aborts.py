"""Clients that leave, at any moment and in any way, leave nothing in the engine."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from pipeline.server import Server, Stream, start_streams, wait_until
from toy import CONTEXT_LEN, VOCAB_SIZE, toy_flags

pytestmark = pytest.mark.alone

NUM_REQUESTS = 2000
NUM_AT_ONCE = 64
SHARE_ABORTED = 0.3
FORGOTTEN_AFTER_S = 0.2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("aborts")
    with Server(toy_flags(folder / "toy"), folder) as server:
        yield server


def num_in_engine(server: Server) -> float:
    return server.gauge("num_running_reqs") + server.gauge("num_queue_reqs")


@dataclass(frozen=True)
class Plan:
    """A request; `leaves_after_s` is None where its client waits for the answer."""

    rid: str
    prompt_len: int
    num_tokens: int
    is_stream: bool
    leaves_after_s: float | None
    by_rid: bool

    def body(self, chance: random.Random) -> dict[str, Any]:
        return {
            "rid": self.rid,
            "input_ids": [chance.randrange(VOCAB_SIZE) for _ in range(self.prompt_len)],
            "stream": self.is_stream,
            "sampling_params": {"max_new_tokens": self.num_tokens, "ignore_eos": True},
        }


def make_plan(number: int, chance: random.Random) -> Plan:
    """Most prompts are short; some are prefilled in several chunks."""
    is_long = chance.random() < 0.03
    return Plan(
        rid=f"request-{number}",
        prompt_len=chance.randint(600, CONTEXT_LEN - 100) if is_long else chance.randint(1, 20),
        num_tokens=chance.randint(1, 16),
        is_stream=chance.random() < 0.5,
        leaves_after_s=chance.uniform(0.0, 0.4) if chance.random() < SHARE_ABORTED else None,
        by_rid=chance.random() < 0.3,
    )


class Crowd:
    """Clients that share a session; `answers` counts how their requests ended."""

    def __init__(self, url: str, http: aiohttp.ClientSession, chance: random.Random) -> None:
        self._url = url
        self._http = http
        self._chance = chance
        self._places = asyncio.Semaphore(NUM_AT_ONCE)
        self.answers: dict[str, int] = {}

    async def ask(self, plan: Plan) -> None:
        async with self._places:
            end = await self._ask_or_leave(plan)
        self.answers[end] = self.answers.get(end, 0) + 1

    async def _ask_or_leave(self, plan: Plan) -> str:
        asking = asyncio.create_task(self._ask(plan))
        await asyncio.wait([asking], timeout=plan.leaves_after_s)
        if plan.by_rid and not asking.done():
            async with self._http.post(f"{self._url}/abort_request", json={"rid": plan.rid}) as r:
                assert r.status == 200
            return await asking
        asking.cancel()
        with suppress(asyncio.CancelledError):
            return await asking
        return "left"

    async def _ask(self, plan: Plan) -> str:
        body = plan.body(self._chance)
        async with self._http.post(f"{self._url}/generate", json=body) as response:
            text = await response.text()
        if response.status != 200:
            return f"status {response.status}: {text}"
        if '"abort"' in text:
            return "aborted"
        assert f'"completion_tokens":{plan.num_tokens},' in text
        return "complete"


def test_thirty_in_a_hundred_leave_and_no_token_of_cache_is_lost(server: Server) -> None:
    chance = random.Random(2)
    plans = [make_plan(number, chance) for number in range(NUM_REQUESTS)]

    async def ask_all() -> dict[str, int]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            crowd = Crowd(f"http://127.0.0.1:{server.port}", http, chance)
            await asyncio.gather(*map(crowd.ask, plans))
            return crowd.answers

    answers = asyncio.run(ask_all())
    statuses = {end for end in answers if end.startswith("status")}
    assert all(end.startswith("status 499") for end in statuses), statuses
    assert answers["complete"] >= sum(plan.leaves_after_s is None for plan in plans)
    assert answers["left"] > 100, answers
    assert answers["complete"] < NUM_REQUESTS - 200, answers
    assert wait_until(lambda: num_in_engine(server) == 0, 2.0)
    assert server.post("/flush_cache")[0] == 200
    assert server.gauge("num_used_tokens") == 0
    assert "Abort" in server.log
    assert "Traceback" not in server.log


def test_engine_forgets_a_client_that_leaves_at_once(server: Server) -> None:
    def forget(stream: Stream) -> float:
        started = time.monotonic()
        stream.leave()
        assert wait_until(lambda: num_in_engine(server) == 0, 5.0)
        return time.monotonic() - started

    waits = [forget(start_streams(server, 1)[0]) for _ in range(9)]
    assert statistics.median(waits) < FORGOTTEN_AFTER_S, waits


def test_engine_forgets_an_aborted_rid_at_once(server: Server) -> None:
    def forget(rid: str) -> float:
        [stream] = start_streams(server, 1, rid=rid)
        started = time.monotonic()
        assert server.post("/abort_request", {"rid": rid})[0] == 200
        assert wait_until(lambda: num_in_engine(server) == 0, 5.0)
        waited_s = time.monotonic() - started
        assert stream.join() == "aborted"
        return waited_s

    waits = [forget(f"stream-{number}") for number in range(9)]
    assert statistics.median(waits) < FORGOTTEN_AFTER_S, waits


def test_clients_that_leave_while_they_wait_are_never_run(server: Server) -> None:
    """The engine runs 32 at a time; whoever queues behind them and leaves costs nothing."""
    running = start_streams(server, 32, num_tokens=400)
    waiting = [Stream(server, num_tokens=400) for _ in range(8)]
    assert wait_until(lambda: server.gauge("num_queue_reqs") == 8, 5.0)
    for stream in waiting:
        stream.leave()
    assert wait_until(lambda: server.gauge("num_queue_reqs") == 0, 5.0)
    assert not any(stream.output_ids for stream in waiting)
    for stream in running:
        stream.leave()
    assert wait_until(lambda: num_in_engine(server) == 0, 5.0)
