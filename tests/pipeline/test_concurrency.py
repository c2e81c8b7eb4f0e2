"""What a request gets does not depend on who is served beside it, nor on what was served before."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from prompts import PROMPTS

import sgl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Fields = dict[str, Any]

NUM_REQUESTS, NUM_REQUESTS_FULL = 24, 64
ARRIVE_WITHIN_S = 1.0
SHORT = ("short-france", "chat-turns")
LONG = "long-three"
SAMPLINGS: list[Fields] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.9, "min_p": 0.05, "frequency_penalty": 0.5},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2},
    {"temperature": 1.0, "presence_penalty": 0.6, "min_new_tokens": 8},
]


def greedy_requests(num_requests: int) -> list[Fields]:
    """Prompts and answers of mixed lengths; no two prompts are the same."""
    rng = random.Random(7)
    texts = list(PROMPTS.values())
    return [
        {
            "prompt": f"{number}. {texts[number % len(texts)]}",
            "sampling_params": {"temperature": 0, "max_new_tokens": rng.randint(1, 32)},
        }
        for number in range(num_requests)
    ]


def sampled_requests() -> list[Fields]:
    prompts = [PROMPTS["short-story"], PROMPTS["chat-code"]]
    return [
        {
            "prompt": prompts[number % 2],
            "sampling_params": {**sampling, "seed": 100 + number, "max_new_tokens": 24},
        }
        for number, sampling in enumerate(SAMPLINGS)
    ]


def one_by_one(engine: sgl.Engine, requests: Sequence[Fields]) -> list[Fields]:
    return [engine.generate(**request) for request in requests]


def together(engine: sgl.Engine, requests: Sequence[Fields]) -> list[Fields]:
    """They arrive at random moments, so that they meet in ever other batches."""
    rng = random.Random(11)

    async def ask(request: Fields) -> Fields:
        await asyncio.sleep(rng.uniform(0, ARRIVE_WITHIN_S))
        output: Fields = await engine.async_generate(**request)
        return output

    async def ask_all() -> list[Fields]:
        return await asyncio.gather(*map(ask, requests))

    return asyncio.run(ask_all())


def ids_and_texts(outputs: Sequence[Fields]) -> list[tuple[list[int], str]]:
    return [(output["output_ids"], output["text"]) for output in outputs]


def columns(output: Fields, kind: str) -> Iterator[list[float]]:
    """The log-probabilities of one kind, its alternatives' and its chosen tokens'."""
    meta = output["meta_info"]
    yield [value for value, *_ in meta[f"{kind}_token_logprobs"] if value is not None]
    for name in (f"{kind}_top_logprobs", f"{kind}_token_ids_logprobs"):
        yield [value for rows in meta[name] if rows is not None for value, *_ in rows]


def assert_close(ones: Fields, others: Fields, kind: str, tolerance: float) -> None:
    for one, other in zip(columns(ones, kind), columns(others, kind), strict=True):
        assert one == pytest.approx(other, abs=tolerance)


def test_greedy_answers_are_the_same_alone_and_in_company(engine, is_full):
    requests = greedy_requests(NUM_REQUESTS_FULL if is_full else NUM_REQUESTS)
    alone = one_by_one(engine, requests)
    assert engine.flush_cache()
    assert ids_and_texts(together(engine, requests)) == ids_and_texts(alone)


def test_sampled_answers_with_a_seed_are_the_same_alone_and_in_company(engine):
    requests = sampled_requests()
    alone = one_by_one(engine, requests)
    assert engine.flush_cache()
    company = together(engine, requests + greedy_requests(8))
    assert ids_and_texts(company[: len(requests)]) == ids_and_texts(alone)


def test_another_seed_gives_another_answer(engine):
    sampling = {"temperature": 1.0, "max_new_tokens": 24}
    prompts = [PROMPTS["short-story"]] * 4
    outputs = engine.generate(prompts, [{**sampling, "seed": seed} for seed in range(4)])
    assert len({output["text"] for output in outputs}) == 4


def test_log_probabilities_are_the_same_alone_and_in_company(engine):
    wanted = {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 3,
        "token_ids_logprob": [0, 2, 198, 49151],
    }
    requests = [request | wanted for request in (greedy_requests(4) + sampled_requests())]
    alone = one_by_one(engine, requests)
    assert engine.flush_cache()
    company = together(engine, requests + greedy_requests(12) + sampled_requests())
    for one, other in zip(alone, company[: len(requests)], strict=True):
        assert one["output_ids"] == other["output_ids"]
        assert len(one["meta_info"]["output_token_logprobs"]) == len(one["output_ids"])
        for kind in ("input", "output"):
            assert_close(one, other, kind, tolerance=1e-4)


@pytest.mark.parametrize(
    "engine", [{}, {"chunked_prefill_size": 16}], indirect=True, ids=["whole", "chunked"]
)
@pytest.mark.parametrize("name", [*SHORT, LONG])
def test_prompt_log_probabilities_are_those_of_transformers(engine, reference, name):
    """Cold, after a hit of the whole prompt, and from any position on."""
    answer = reference.answers[name]
    prompt_len = len(answer.prompt_ids)
    values = [math.nan, *answer.prompt_logprobs]
    assert engine.flush_cache()
    for start in (0, 0, 1, 3, prompt_len // 2, prompt_len - 1):
        meta = engine.generate(
            PROMPTS[name],
            {"temperature": 0, "max_new_tokens": 0},
            return_logprob=True,
            logprob_start_len=start,
        )["meta_info"]
        rows = meta["input_token_logprobs"]
        ours = [math.nan if value is None else value for value, *_ in rows]
        assert [token_id for _, token_id, _ in rows] == answer.prompt_ids[start:]
        assert ours == pytest.approx(values[start:], abs=1e-3, nan_ok=True)
