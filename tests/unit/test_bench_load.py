"""When requests leave, how many run at a time, and how conversations go on."""

from __future__ import annotations

import asyncio
import math
import statistics
from itertools import pairwise

import pytest

from sgl.bench.load import LoadGenerator, Run, arrivals
from sgl.bench.prompts import Conversation, Turn, continuous
from sgl.bench.servers import Answer
from sgl.errors import InvalidRequestError


class FakeAsk:
    """Answers with "(answer N)" and remembers what it was asked."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.contents: list[object] = []
        self.running = self.peak = 0

    async def __call__(self, content, turn) -> Answer:
        self.contents.append(content)
        self.running += 1
        self.peak = max(self.peak, self.running)
        await asyncio.sleep(0.002)
        self.running -= 1
        error = "no" if self.failing and self.failing in str(content) else ""
        return Answer(text=f"(answer {turn.output_len})", error=error)


def send(ask: FakeAsk, conversations: list[Conversation], starts=None, **named) -> Run:
    async def run() -> Run:
        generator = LoadGenerator(ask, named.pop("to_content", continuous), **named)
        return await generator.run(conversations, starts or [0.0] * len(conversations))

    return asyncio.run(run())


def test_arrivals_are_seeded_and_begin_at_once():
    times = arrivals(100, 5.0, 1.0, seed=3)
    assert times == arrivals(100, 5.0, 1.0, seed=3)
    assert times != arrivals(100, 5.0, 1.0, seed=4)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert arrivals(3, math.inf, 1.0, seed=3) == [0.0, 0.0, 0.0]
    assert arrivals(0, 5.0, 1.0, seed=3) == []


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness):
    times = arrivals(20001, 8.0, burstiness, seed=1)
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.05)
    variation = statistics.stdev(gaps) / statistics.mean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)


def test_requests_leave_in_order_at_their_times():
    ask = FakeAsk()
    conversations = [(Turn(text, 1),) for text in "abc"]
    run = send(ask, conversations, [0.0, 0.01, 0.02])
    assert ask.contents == ["a", "b", "c"]
    assert ask.peak == 1
    assert [exchange.content for exchange in run.exchanges] == ["a", "b", "c"]


@pytest.mark.parametrize(("limit", "peak"), [(None, 20), (3, 3), (1, 1)])
def test_no_more_requests_run_than_allowed(limit, peak):
    ask = FakeAsk()
    run = send(ask, [(Turn("a", 1),)] * 20, max_concurrency=limit)
    assert ask.peak == peak
    assert len(run.exchanges) == 20


def test_a_turn_holds_all_answers_before_it():
    ask = FakeAsk()
    send(ask, [(Turn("one", 1), Turn("two", 2), Turn("three", 3))])
    assert ask.contents[1:] == [
        "one(answer 1)\n\ntwo",
        "one(answer 1)\n\ntwo(answer 2)\n\nthree",
    ]
    ask = FakeAsk()
    send(ask, [(Turn("one", 1), Turn("two", 2))], to_content=list)
    assert ask.contents == [
        [{"role": "user", "content": "one"}],
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "(answer 1)"},
            {"role": "user", "content": "two"},
        ],
    ]


def test_ids_are_sent_as_they_are():
    ask = FakeAsk()
    send(ask, [(Turn([1, 2], 1),)])
    assert ask.contents == [[1, 2]]


def test_a_failure_ends_its_conversation_and_no_other():
    ask, ended = FakeAsk(failing="bad"), []
    conversations = [(Turn("good", 1), Turn("too", 1)), (Turn("bad", 1), Turn("never", 1))]
    run = send(ask, conversations, on_end=ended.append)
    assert [exchange.answer.error for exchange in run.exchanges].count("no") == 1
    assert len(run.exchanges) == 3
    assert sum(ended) == 4, "the bar must reach its end"


def test_messages_a_template_refuses_are_a_failed_request():
    def refuse(messages):
        raise InvalidRequestError("roles must alternate")

    ask = FakeAsk()
    run = send(ask, [(Turn("a", 1),)], to_content=refuse)
    assert [exchange.answer.error for exchange in run.exchanges] == ["roles must alternate"]
    assert ask.contents == []
