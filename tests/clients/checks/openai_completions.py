"""openai: text completions."""

from __future__ import annotations

import math
from typing import Any

import openai

from checks.common import (
    COMPLETION,
    ITALIAN_COMPLETION,
    ITALY,
    PARIS_ID,
    PROMPT,
    PROMPT_IDS,
    TEXT,
    VARIED_TEXT,
)
from checks.openai_client import client, raised


def ask(**fields: Any) -> Any:
    return client.completions.create(**(TEXT | fields))


def texts(**fields: Any) -> list[str]:
    return [choice.text for choice in ask(**fields).choices]


def check_text() -> None:
    answer = ask()
    [choice] = answer.choices
    assert (choice.text, choice.index, choice.finish_reason) == (COMPLETION, 0, "length")
    assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 2, 7)


def check_max_tokens_is_16_by_default() -> None:
    answer = client.completions.create(
        model="default", prompt=PROMPT, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 16


def check_several_prompts() -> None:
    answer = ask(prompt=[PROMPT, ITALY])
    assert [choice.text for choice in answer.choices] == [COMPLETION, ITALIAN_COMPLETION]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 4)


def check_several_prompts_and_answers() -> None:
    """Prompt by prompt."""
    found = texts(prompt=[PROMPT, ITALY], n=2, extra_body={"top_k": 1})
    assert found == [COMPLETION] * 2 + [ITALIAN_COMPLETION] * 2


def check_token_ids() -> None:
    assert texts(prompt=PROMPT_IDS) == [COMPLETION]
    assert texts(prompt=[PROMPT_IDS, PROMPT_IDS], max_tokens=1) == [" Paris"] * 2


def check_echo() -> None:
    assert texts(echo=True) == [PROMPT + COMPLETION]
    assert texts(echo=True, prompt=PROMPT_IDS) == [PROMPT + COMPLETION]


def check_logprobs() -> None:
    answer = ask(logprobs=2)
    told = answer.choices[0].logprobs
    assert told.tokens == [" Paris", "."]
    assert told.text_offset == [0, 6]
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == max(top.values()) == value
    assert math.isclose(told.token_logprobs[0], -0.258, abs_tol=0.02)


def check_logprobs_0() -> None:
    told = ask(logprobs=0).choices[0].logprobs
    assert (told.tokens, len(told.token_logprobs), told.top_logprobs) == ([" Paris", "."], 2, None)


def check_logprobs_of_a_prompt() -> None:
    """How a benchmark scores a text: echo, and nothing new."""
    told = ask(echo=True, max_tokens=0, logprobs=1)
    logprobs = told.choices[0].logprobs
    assert told.choices[0].text == PROMPT == "".join(logprobs.tokens)
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset == [0, 3, 11, 14, 21]
    assert logprobs.top_logprobs[0] is None
    assert math.isclose(logprobs.token_logprobs[-1], -0.451, abs_tol=0.02)
    assert told.usage.completion_tokens == 0


def check_logit_bias() -> None:
    assert texts(logit_bias={str(PARIS_ID): 100}) == [" Paris Paris"]
    assert "Paris" not in texts(logit_bias={str(PARIS_ID): -100})[0]


def check_stop() -> None:
    [choice] = ask(stop=[".", "\n"]).choices
    assert (choice.text, choice.finish_reason, choice.matched_stop) == (" Paris", "stop", ".")


def check_seed() -> None:
    def sampled(seed: int) -> str:
        return texts(**VARIED_TEXT, seed=seed)[0]

    assert sampled(1) == sampled(1) != sampled(2)


def check_penalties() -> None:
    ha: dict[str, Any] = {"prompt": "ha ha ha ha", "max_tokens": 6}
    [plain] = texts(**ha)
    [fresh] = texts(**ha, frequency_penalty=2)
    assert plain.count(" ha") > fresh.count(" ha")
    assert texts(**ha, presence_penalty=2) != [plain]
    assert texts(**ha, extra_body={"repetition_penalty": 2.0}) != [plain]


def check_best_of_and_suffix_are_not_ignored() -> None:
    for fields in ({"best_of": 3}, {"suffix": "!"}):
        error = raised(openai.BadRequestError, ask, **fields)
        assert error.param == next(iter(fields))
    assert texts(best_of=1) == [COMPLETION]
