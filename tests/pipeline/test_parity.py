"""The text is right: in every mode of serving, greedy answers are those of `transformers`.

Most modes compare some of the prompts; with `pytest --full` every mode compares all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from prompts import PROMPTS, SUBSET, chat
from reference import NUM_ANSWER_TOKENS

import sgl
from sgl.model_files import demo_model_path
from sgl.protocol.chat_template import ChatTemplate
from sgl.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ALL = tuple(PROMPTS)
LONGEST_REQUEST = 675 + NUM_ANSWER_TOKENS  # "long-six" and its answer
BFLOAT16_TIE = 0.5  # four steps of a bfloat16 logit between 16 and 32
PARAMS = {"temperature": 0, "max_new_tokens": NUM_ANSWER_TOKENS}
MODES = {
    "chunks of 16 tokens": {"chunked_prefill_size": 16},
    "without radix cache": {"disable_radix_cache": True},
    "three ranks": {"tp_size": 3},
    "pages of 16 tokens": {"page_size": 16},
    "without overlap": {"disable_overlap_schedule": True},
}


def with_engine(**flags: Any) -> pytest.MarkDecorator:
    """Neighbours with the same flags share an engine."""
    name = ", ".join(flags)
    return pytest.mark.parametrize("engine", [flags], ids=[name], indirect=True, scope="module")


in_modes = pytest.mark.parametrize(
    ("mode", "engine"), MODES.items(), ids=list(MODES), indirect=["engine"], scope="module"
)


@pytest.fixture(scope="module")
def some_names(is_full) -> Sequence[str]:
    return ALL if is_full else SUBSET


def ask(engine: sgl.Engine, names: Sequence[str]) -> list[dict[str, Any]]:
    """All at once."""
    return engine.generate([PROMPTS[name] for name in names], PARAMS)


def check(comparison, reference, names, outputs) -> None:
    for name, output in zip(names, outputs, strict=True):
        comparison.add(name, reference.answers[name], output)
    comparison.done(num_expected=len(names))


def test_the_reference_was_made_from_this_model_and_these_prompts(reference):
    file = Path(demo_model_path())
    assert reference.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert reference.max_new_tokens == NUM_ANSWER_TOKENS
    tokenizer = Tokenizer.load(str(file))
    prompt_ids = {name: tokenizer.encode(text).tolist() for name, text in PROMPTS.items()}
    assert prompt_ids == {name: answer.prompt_ids for name, answer in reference.answers.items()}
    assert max(map(len, prompt_ids.values())) + NUM_ANSWER_TOKENS == LONGEST_REQUEST


def test_chat_prompts_are_what_the_template_of_the_model_renders():
    source = Tokenizer.load(demo_model_path()).chat_template
    assert source is not None
    turns = ("My name is Mira.", "Hello Mira, how can I help?", "What is my name?")
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    assert ChatTemplate(source).render(messages) == chat(*turns) == PROMPTS["chat-turns"]


@with_engine()
def test_one_by_one(engine, reference, compare, some_names):
    comparison = compare("one by one")
    outputs = [engine.generate(PROMPTS[name], PARAMS) for name in some_names]
    check(comparison, reference, some_names, outputs)


@with_engine()
def test_all_at_once_and_once_more_from_the_radix_cache(engine, reference, compare):
    assert engine.flush_cache()
    comparison = compare("all at once")
    check(comparison, reference, ALL, ask(engine, ALL))
    comparison = compare("the second time")
    outputs = ask(engine, ALL)
    check(comparison, reference, ALL, outputs)
    for output in outputs:
        meta = output["meta_info"]
        assert meta["cached_tokens"] == meta["prompt_tokens"] - 1


@with_engine(max_total_tokens=int(1.3 * LONGEST_REQUEST))
def test_all_at_once_where_requests_must_be_retracted(engine, reference, compare):
    comparison = compare("KV pool of 1.3 requests")
    check(comparison, reference, ALL, ask(engine, ALL))
    assert engine.get_server_info()["num_retractions"] > 0


@with_engine(max_total_tokens=400, schedule_conservativeness=0)
def test_requests_that_are_retracted_again_and_again_lose_nothing(
    engine, reference, compare, is_full
):
    names = [name for name in ALL if len(reference.answers[name].prompt_ids) < 60]
    names = names if is_full else names[::2]
    comparison = compare("KV pool of 400 tokens, nothing held back")
    prompts = [PROMPTS[name] for name in names]
    outputs = engine.generate(prompts, PARAMS, return_logprob=True, logprob_start_len=0)
    check(comparison, reference, names, outputs)
    for name, output in zip(names, outputs, strict=True):
        meta, answer = output["meta_info"], reference.answers[name]
        prompt_logprobs = [value for value, *_ in meta["input_token_logprobs"][1:]]
        assert prompt_logprobs == pytest.approx(answer.prompt_logprobs, abs=1e-3)
        output_ids = [token_id for _, token_id, _ in meta["output_token_logprobs"]]
        assert output_ids == answer.output_ids
    assert engine.get_server_info()["num_retractions"] > 3


@in_modes
def test_some_at_once(engine, mode, reference, compare, some_names):
    comparison = compare(mode)
    check(comparison, reference, some_names, ask(engine, some_names))


@with_engine(dtype="bfloat16")
def test_in_bfloat16_answers_part_only_where_the_model_is_undecided(
    engine, reference, compare, some_names
):
    num_names = len(some_names)
    comparison = compare("bfloat16", tie=BFLOAT16_TIE, max_excused=num_names * 8 // 10)
    check(comparison, reference, some_names, ask(engine, some_names))


@with_engine(dtype="bfloat16")
def test_in_bfloat16_the_capital_of_france_is_paris(engine):
    question = "What is the capital of France? Answer in one sentence."
    for prompt in (PROMPTS["short-france"], chat(question)):
        assert "Paris" in engine.generate(prompt, PARAMS)["text"]
