"""The front against a fake engine, over channels that encode every message."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from array import array
from typing import Any

import pytest
from fakes import FakeEngine, LetterTokenizer, connected_front, in_loop, until, vector_of

from sgl.actors.front import Front
from sgl.actors.prompt_limits import PromptLimits
from sgl.errors import (
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
)
from sgl.protocol.call import Answer, GenerationCall, PromptCall
from sgl.protocol.encode import encode_request
from sgl.protocol.native import generate_request
from sgl.sampling_params import SamplingParams


def call_for(
    text: Any = "a", stream: bool = False, rid: Any = None, **sampling: Any
) -> GenerationCall:
    fields = {"text": text, "stream": stream, "rid": rid, "sampling_params": sampling}
    return generate_request(fields).call


async def answers_of(front: Front, call: GenerationCall) -> list[Answer]:
    async with await front.submit(call) as running:
        return list(await running.finished())


@in_loop
async def test_a_call_ends_with_its_whole_text() -> None:
    engine = FakeEngine()
    async with connected_front(engine) as front:
        [answer] = await answers_of(front, call_for("a", max_new_tokens=3))
        assert (answer.text, answer.output_ids.tolist()) == ("bcd", [98, 99, 100])
        assert front.num_live == 0
    assert engine.seen[0].text_interval == 0


@in_loop
async def test_the_pieces_of_a_stream_join_to_the_text() -> None:
    async with connected_front(FakeEngine()) as front:
        texts = []
        async with await front.submit(call_for("a", stream=True, max_new_tokens=20)) as running:
            async for [answer] in running.changes():
                texts.append(answer.text)
        assert texts[-1] == "bcdefghijklmnopqrstu"
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert len(texts) > 1


@in_loop
async def test_a_slow_reader_finds_everything_in_one_change() -> None:
    engine = FakeEngine()
    async with connected_front(engine) as front:
        async with await front.submit(call_for("a", stream=True, max_new_tokens=50)) as running:
            await until(lambda: running.is_finished)
            changes = [answer.text async for [answer] in running.changes()]
        assert len(changes) == 1
        assert len(changes[0]) == 50


@in_loop
async def test_answers_come_prompt_by_prompt() -> None:
    async with connected_front(FakeEngine()) as front:
        call = call_for(["a", "x"], rid=["r", "s"], n=2, max_new_tokens=1)
        answers = await answers_of(front, call)
        assert [answer.text for answer in answers] == ["b", "b", "y", "y"]
        assert [answer.rid for answer in answers] == ["r-0", "r-1", "s-0", "s-1"]


@in_loop
async def test_nothing_is_sent_if_one_prompt_of_a_batch_is_wrong() -> None:
    engine = FakeEngine()
    async with connected_front(engine, context_len=8) as front:
        with pytest.raises(PromptTooLongError):
            await front.submit(call_for(["ok", "far too long"], max_new_tokens=1))
        await asyncio.sleep(0.01)
        assert engine.seen == []
        assert front.num_live == 0


@in_loop
async def test_leaving_a_call_aborts_all_its_answers_once() -> None:
    engine = FakeEngine(step_s=0.001)
    async with connected_front(engine) as front:
        async with await front.submit(call_for(["a", "b"], n=3)) as running:
            running.close()
        running.close()
        await asyncio.sleep(0.02)
        assert sorted(engine.aborted) == sorted(message.request_id for message in engine.seen)
        assert len(engine.aborted) == 6
        assert engine.num_running == front.num_live == 0


@in_loop
async def test_cancelling_the_one_who_waits_aborts_the_call() -> None:
    engine = FakeEngine(step_s=0.001)
    async with connected_front(engine) as front:
        task = asyncio.create_task(answers_of(front, call_for("a", max_new_tokens=4000)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
        assert len(engine.aborted) == 1
        assert front.num_live == engine.num_running == 0


@in_loop
async def test_abort_by_rid_ends_the_call_and_keeps_its_text() -> None:
    engine = FakeEngine(step_s=0.001)
    async with connected_front(engine) as front:
        call = call_for("a", rid="mine", stream=True, max_new_tokens=4000)
        async with await front.submit(call) as running:
            changes = running.changes()
            await anext(changes)
            assert front.abort("mine")
            [answer] = await running.finished()
        assert not front.abort("mine")
        assert answer.text.startswith("b")
        assert answer.finish is not None
        assert (answer.finish.kind, answer.failure) == ("abort", None)
        assert front.counts.num_aborted == 1


@in_loop
async def test_a_rid_in_use_is_refused_and_free_again_afterwards() -> None:
    async with connected_front(FakeEngine(step_s=0.001)) as front:
        async with await front.submit(call_for("a", rid="mine")):
            with pytest.raises(InvalidRequestError, match="in use"):
                await front.submit(call_for("a", rid="mine"))
        with pytest.raises(InvalidRequestError, match="in use"):
            await front.submit(call_for(["a", "b"], rid=["twice", "twice"]))
        assert len(await answers_of(front, call_for("a", rid="mine", max_new_tokens=1))) == 1
        assert len(await answers_of(front, call_for("a", rid="twice", max_new_tokens=1))) == 1


@in_loop
async def test_what_a_full_ring_does_not_take_is_sent_a_little_later() -> None:
    engine = FakeEngine(max_messages=2)
    async with connected_front(engine) as front:
        texts = [chr(ord("a") + number) for number in range(20)]
        answers = await answers_of(front, call_for(texts, max_new_tokens=1))
        assert [answer.text for answer in answers] == [chr(ord(text) + 1) for text in texts]
        async with await front.submit(call_for(texts, max_new_tokens=4000)):
            pass
        await until(lambda: len(engine.aborted) == 20)
        assert engine.num_running == front.num_live == 0
        assert len(await answers_of(front, call_for("a", max_new_tokens=1))) == 1


@in_loop
async def test_there_is_room_for_so_many_answers() -> None:
    options = {"max_live_requests": 4, "max_batch_requests": 3}
    async with connected_front(FakeEngine(step_s=0.001), **options) as front:
        with pytest.raises(InvalidRequestError, match="may ask for 3"):
            await front.submit(call_for("a", n=4))
        async with await front.submit(call_for("a", n=3)):
            with pytest.raises(OverloadedError):
                await front.submit(call_for("a", n=2))
            assert len(await answers_of(front, call_for("a", max_new_tokens=1))) == 1
    options = {"max_live_requests": 2, "max_batch_requests": 3}
    async with connected_front(FakeEngine(step_s=0.001), **options) as front:
        with pytest.raises(InvalidRequestError, match="--max-queue-requests"):
            await front.submit(call_for("a", n=3))  # there never is room: no use in trying again


@in_loop
async def test_when_the_engine_dies_everybody_hears_it_at_once() -> None:
    async with connected_front(FakeEngine(step_s=0.001)) as front:
        waiting = [
            asyncio.create_task(answers_of(front, call_for("a", stream=stream)))
            for stream in (True, False)
        ]
        waiting.append(asyncio.create_task(front.control("flush_cache")))
        await asyncio.sleep(0)
        front.engine_died("it was killed")
        for task in waiting:
            with pytest.raises(EngineError, match="it was killed"):
                await task
        with pytest.raises(EngineError):
            await front.submit(call_for("a"))
        assert front.num_live == 0
        assert front.is_dead


@in_loop
async def test_before_the_engine_is_ready_calls_are_refused() -> None:
    async with connected_front(FakeEngine(), is_open=False) as front:
        with pytest.raises(OverloadedError, match="loaded"):
            await front.submit(call_for("a"))


@in_loop
async def test_a_failure_in_the_engine_fails_one_answer() -> None:
    engine = FakeEngine()
    async with connected_front(engine) as front:
        engine.fail_next("the logits were NaN", 500)
        [answer] = await answers_of(front, call_for("a"))
        assert isinstance(answer.failure, EngineError)


@in_loop
async def test_control_calls_get_their_own_reply() -> None:
    engine = FakeEngine(step_s=0.001)
    async with connected_front(engine) as front:
        assert (await front.control("flush_cache")).ok
        async with await front.submit(call_for("a", max_new_tokens=4000)):
            await asyncio.sleep(0.005)
            assert not (await front.control("flush_cache")).ok


@in_loop
async def test_abort_all_ends_every_call() -> None:
    async with connected_front(FakeEngine(step_s=0.001)) as front:
        tasks = [asyncio.create_task(answers_of(front, call_for("a"))) for _ in range(5)]
        await asyncio.sleep(0.01)
        assert front.abort_all() == 5
        for task in tasks:
            [answer] = await task
            assert answer.finish is not None
            assert answer.finish.kind == "abort"


@in_loop
async def test_a_long_text_is_tokenized_off_the_loop() -> None:
    class SlowTokenizer(LetterTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> array[int]:
            time.sleep(0.1)
            return super().encode(text)

    async with connected_front(
        FakeEngine(), tokenizer=SlowTokenizer(), context_len=100_000
    ) as front:
        front.receive([])
        task = asyncio.create_task(front.submit(call_for("x" * 5000)))
        num_ticks = 0
        while not task.done():
            await asyncio.sleep(0.001)
            num_ticks += 1
        with pytest.raises(PromptTooLongError):  # the fake engine's KV cache is smaller
            task.result()
        assert num_ticks > 10


@in_loop
async def test_a_huge_text_is_refused_without_tokenizing() -> None:
    class NoTokenizer(LetterTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> array[int]:
            raise AssertionError("it was tokenized")

    async with connected_front(FakeEngine(), tokenizer=NoTokenizer()) as front:
        with pytest.raises(PromptTooLongError, match=r"4000000 .*4096"):
            await front.submit(call_for("x" * 4_000_000))


@in_loop
async def test_counts_add_up() -> None:
    async with connected_front(FakeEngine()) as front:
        await answers_of(front, call_for("abc", stream=True, max_new_tokens=5))
        await answers_of(front, call_for("abc", n=2, max_new_tokens=5))
        counts = front.counts
        assert (counts.num_requests, counts.num_prompt_tokens) == (3, 9)
        assert counts.num_generated_tokens == 15
        assert counts.num_cached_tokens == 6
        assert counts.time_to_first_token.count == 1
        assert counts.inter_token_latency.count == 4
        assert counts.end_to_end_latency.count == 3


@in_loop
async def test_whatever_clients_do_nothing_is_left_behind() -> None:
    rng = random.Random(5)
    engine = FakeEngine(max_messages=40)
    async with connected_front(engine, max_live_requests=60) as front:

        async def client(number: int) -> None:
            fields = {"n": rng.randint(1, 3), "max_new_tokens": rng.randint(0, 40)}
            call = call_for(["a"] * rng.randint(1, 4), stream=rng.random() < 0.5, **fields)
            try:
                async with asyncio.timeout(rng.choice([0.0, 0.001, 0.01, 5.0])):
                    answers = await answers_of(front, call)
                assert all(len(answer.output_ids) == fields["max_new_tokens"] for answer in answers)
            except (TimeoutError, OverloadedError):
                pass

        for _ in range(10):
            await asyncio.gather(*map(client, range(30)))
        await until(lambda: engine.num_running == 0)
        assert front.num_live == 0
        assert await front.wait_idle(0.1)


LIMITS = PromptLimits(context_len=100, max_request_tokens=80, vocab_size=256)


def prompt_call(**sampling: Any) -> PromptCall:
    return PromptCall(
        prompt="",
        sampling=SamplingParams(**sampling),
        is_length_explicit="max_new_tokens" in sampling,
    )


@pytest.mark.parametrize(
    ("num_tokens", "is_taken"), [(78, True), (79, True), (80, False), (101, False)]
)
def test_the_longest_prompt_leaves_room_for_one_token(num_tokens: int, is_taken: bool) -> None:
    ids = array("i", [1] * num_tokens)
    if is_taken:
        assert LIMITS.cut(ids) == ids
        assert LIMITS.sampling(prompt_call(), num_tokens).max_new_tokens == 80 - num_tokens
    else:
        with pytest.raises(PromptTooLongError, match=str(num_tokens)):
            LIMITS.cut(ids)


@pytest.mark.parametrize(("num_tokens", "is_taken"), [(80, True), (81, False)])
def test_a_prompt_without_an_answer_needs_no_room_for_one(num_tokens: int, is_taken: bool) -> None:
    limits = PromptLimits(context_len=100, max_request_tokens=80, vocab_size=256, min_answer_len=0)
    ids = array("i", [1] * num_tokens)
    if is_taken:
        assert limits.cut(ids) == ids
    else:
        with pytest.raises(PromptTooLongError, match="exceeds the maximum allowed length \\(80"):
            limits.cut(ids)


class ClosingTokenizer(LetterTokenizer):
    closing_id = 4


@pytest.mark.parametrize(
    ("text", "cut_to", "wanted"),
    [("ab", 4096, [97, 98, 4]), ("ab\4", 4096, [97, 98, 4]), ("abcdef", 4, [97, 98, 99, 4])],
)
@in_loop
async def test_a_text_to_embed_ends_with_the_closing_token(
    text: str, cut_to: int, wanted: list[int]
) -> None:
    engine = FakeEngine()
    options = {"is_pooled": True, "context_len": cut_to, "allow_auto_truncate": True}
    async with connected_front(engine, tokenizer=ClosingTokenizer(), **options) as front:
        [answer] = await answers_of(front, encode_request({"text": text}).call)
        assert answer.prompt_ids.tolist() == wanted
        plain = {"text": text[:2], "add_special_tokens": False}
        [answer] = await answers_of(front, encode_request(plain).call)
        assert answer.prompt_ids.tolist() == [97, 98]
        [answer] = await answers_of(front, encode_request({"input_ids": [97, 98]}).call)
        assert answer.prompt_ids.tolist() == [97, 98]


@in_loop
async def test_only_what_the_model_gives_can_be_asked_for() -> None:
    engine = FakeEngine()
    async with connected_front(engine, is_pooled=True) as front:
        [answer] = await answers_of(front, encode_request({"text": "ab", "cache_salt": "s"}).call)
        assert answer.vector == vector_of([97, 98])
        assert (answer.num_cached, answer.failure) == (1, None)
        assert engine.embedded[0].namespace == "s"
        with pytest.raises(InvalidRequestError, match="gives vectors of texts"):
            await front.submit(call_for("a"))
        assert front.num_live == 0
    async with connected_front(engine) as front:
        with pytest.raises(InvalidRequestError, match="--is-embedding"):
            await front.submit(encode_request({"text": "a"}).call)
    assert engine.seen == []


def test_truncation_keeps_the_beginning() -> None:
    limits = PromptLimits(
        context_len=100, max_request_tokens=80, vocab_size=256, allow_auto_truncate=True
    )
    assert limits.cut(array("i", range(100))) == array("i", range(79))


@pytest.mark.parametrize(("max_new_tokens", "clipped"), [(5, 5), (70, 70), (90, 70), (None, 70)])
def test_the_answer_is_clipped_to_what_is_left(max_new_tokens: int | None, clipped: int) -> None:
    assert LIMITS.sampling(prompt_call(max_new_tokens=max_new_tokens), 10).max_new_tokens == clipped


def test_an_answer_asked_for_that_cannot_fit_is_refused() -> None:
    with pytest.raises(PromptTooLongError, match="total of 101"):
        LIMITS.sampling(prompt_call(max_new_tokens=91), 10)


def test_a_default_length_that_cannot_fit_is_clipped() -> None:
    assert LIMITS.sampling(prompt_call(), 10).max_new_tokens == 70


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {256: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"stop_token_ids": (256,)},
        {"stop_token_ids": (-1,)},
    ],
)
def test_ids_outside_the_vocabulary_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        LIMITS.sampling(prompt_call(**fields), 10)


@pytest.mark.parametrize("ids", [[-1], [256], [2**31 - 1], []])
def test_prompts_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        LIMITS.cut(array("i", ids))
