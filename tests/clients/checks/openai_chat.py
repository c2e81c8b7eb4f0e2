"""openai: chat completions, and every parameter of them."""

from __future__ import annotations

import math
import time
from typing import Any

from checks.common import (
    ANSWER,
    DOT_ID,
    MESSAGES,
    NUM_ANSWER_TOKENS,
    NUM_QUESTION_TOKENS,
    PARIS_ID,
    QUESTION,
    SHORT,
    VARIED_CHAT,
)
from checks.openai_client import client, content

create = client.chat.completions.create


def ask(**fields: Any) -> Any:
    return create(**(SHORT | fields))


def sampled(**fields: Any) -> str:
    return content(create(**(VARIED_CHAT | fields)))


def check_answer() -> None:
    answer = ask()
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert choice.message.tool_calls is None
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60


def check_the_model_is_the_one_asked_for() -> None:
    assert ask(max_tokens=1).model == "default"
    assert ask(max_tokens=1, model="gpt-4o").model == "gpt-4o"


def check_usage_adds_up() -> None:
    usage = ask().usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        NUM_QUESTION_TOKENS,
        NUM_ANSWER_TOKENS,
    )
    assert usage.total_tokens == NUM_QUESTION_TOKENS + NUM_ANSWER_TOKENS


def check_usage_tells_of_cached_tokens() -> None:
    fields = SHORT | {"max_tokens": 1, "extra_body": {"cache_salt": str(time.time_ns())}}
    usages = [create(**fields).usage.model_dump() for _ in range(2)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached == [0, NUM_QUESTION_TOKENS - 1]


def check_max_tokens_cuts() -> None:
    answer = ask(max_tokens=3)
    assert content(answer) == "The capital of"
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def check_max_completion_tokens_wins_over_max_tokens() -> None:
    answer = ask(extra_body={"max_completion_tokens": 2})
    assert content(answer) == "The capital"


def check_the_number_of_tokens_counts_before_the_end() -> None:
    assert ask(max_tokens=NUM_ANSWER_TOKENS + 1).choices[0].finish_reason == "stop"
    assert ask(max_tokens=NUM_ANSWER_TOKENS).choices[0].finish_reason == "length"


def check_stop_text() -> None:
    [choice] = ask(stop="Paris").choices
    assert (choice.message.content, choice.finish_reason) == ("The capital of France is ", "stop")
    assert choice.matched_stop == "Paris"


def check_stop_list() -> None:
    [choice] = ask(stop=["Rome", " of"]).choices
    assert (choice.message.content, choice.matched_stop) == ("The capital", " of")


def check_stop_token_ids() -> None:
    [choice] = ask(extra_body={"stop_token_ids": [DOT_ID]}).choices
    assert (choice.message.content, choice.matched_stop) == (
        "The capital of France is Paris",
        DOT_ID,
    )


def check_no_stop_trim() -> None:
    assert content(ask(stop="capital", extra_body={"no_stop_trim": True})) == "The capital"


def check_n() -> None:
    answer = create(**VARIED_CHAT, n=3, seed=1)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    alone = create(**VARIED_CHAT, seed=1)
    assert texts[0] == content(alone)
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens, "counted once"
    assert answer.usage.completion_tokens == 12


def check_seed() -> None:
    first, again, other = sampled(seed=7), sampled(seed=7), sampled(seed=8)
    assert first == again != other


def check_temperature_0_is_greedy() -> None:
    assert (
        content(ask(max_tokens=4)) == content(ask(max_tokens=4, seed=5)) == "The capital of France"
    )


def check_top_p() -> None:
    assert content(ask(temperature=1.8, max_tokens=4, top_p=1e-6)) == "The capital of France"


def check_top_k() -> None:
    only_best = ask(temperature=1.8, max_tokens=4, extra_body={"top_k": 1})
    assert content(only_best) == "The capital of France"


def check_min_p() -> None:
    only_best = ask(temperature=1.8, max_tokens=4, extra_body={"min_p": 1.0})
    assert content(only_best) == "The capital of France"


def check_logit_bias() -> None:
    assert content(ask(max_tokens=3, logit_bias={str(PARIS_ID): 100})) == " Paris" * 3
    assert "Paris" not in content(ask(logit_bias={str(PARIS_ID): -100}))


def check_penalties() -> None:
    """The model repeats itself, unless a penalty of the output or of all text forbids it."""
    begun = [
        {"role": "user", "content": "Repeat: ha ha ha ha ha"},
        {"role": "assistant", "content": "ha ha ha ha"},
    ]
    fields: dict[str, Any] = {"messages": begun, "max_tokens": 6}
    assert content(ask(**fields)) == " ha" * 6
    assert content(ask(**fields, frequency_penalty=-1, presence_penalty=-1)) == " ha" * 6
    assert content(ask(**fields, frequency_penalty=2)).count(" ha") < 4
    assert " ha" not in content(ask(**fields, extra_body={"repetition_penalty": 2.0}))


def check_logprobs() -> None:
    answer = ask(logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens == NUM_ANSWER_TOKENS
    assert "".join(token.token for token in tokens[:-1]) == ANSWER
    for token in tokens:
        assert bytes(token.bytes).decode() == token.token
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert (token.top_logprobs[0].token, values[0]) == (token.token, token.logprob)
        assert 0 < sum(map(math.exp, values)) < 1 + 1e-4
    assert math.isclose(tokens[0].logprob, -0.601, abs_tol=0.02)


def check_logprobs_without_top() -> None:
    [token] = ask(logprobs=True, max_tokens=1).choices[0].logprobs.content
    assert (token.token, token.top_logprobs) == ("The", [])


def check_logprobs_are_the_models_own() -> None:
    """Not those of the distribution that temperature and bias make."""
    fields = {"logprobs": True, "max_tokens": 1, "seed": 1}
    [plain] = ask(**fields).choices[0].logprobs.content
    [hot] = ask(**fields, temperature=1.8, logit_bias={"504": 100}).choices[0].logprobs.content
    assert hot.token == plain.token == "The"
    assert math.isclose(hot.logprob, plain.logprob, abs_tol=1e-3)


def check_system_and_developer_are_one_role() -> None:
    answers = [
        ask(messages=[{"role": role, "content": "You are a pirate."}, *MESSAGES], max_tokens=4)
        for role in ("system", "developer")
    ]
    assert content(answers[0]) == content(answers[1])
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens != NUM_QUESTION_TOKENS


def check_content_parts() -> None:
    head, tail = QUESTION[:10], QUESTION[10:]
    parts = [{"type": "text", "text": head}, {"type": "text", "text": tail}]
    answer = ask(messages=[{"role": "user", "content": parts}], max_tokens=4)
    assert (content(answer), answer.usage.prompt_tokens) == (
        "The capital of France",
        NUM_QUESTION_TOKENS,
    )


def check_assistant_prefill_is_continued() -> None:
    begun = {"role": "assistant", "content": "The capital of France is"}
    assert content(ask(messages=[*MESSAGES, begun])) == " Paris."


def check_an_answer_can_be_sent_back() -> None:
    """As the client's object, with all its nulls."""
    message = ask().choices[0].message
    answer = ask(messages=[*MESSAGES, message, {"role": "user", "content": "And of Italy?"}])
    assert "Italy" in content(answer)
    assert answer.usage.prompt_tokens > NUM_QUESTION_TOKENS + NUM_ANSWER_TOKENS


def check_names_of_speakers() -> None:
    named = [{"role": "user", "content": QUESTION, "name": "Ada"}]
    assert content(ask(messages=named, max_tokens=4)) == "The capital of France"


def check_fields_without_effect_are_taken() -> None:
    more = {
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "verbosity": "low",
        "modalities": ["text"],
        "prompt_cache_key": "key",
        "safety_identifier": "me",
    }
    assert content(ask(max_tokens=4, user="me", extra_body=more)) == "The capital of France"


def check_tools_that_may_not_be_called() -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert content(ask(max_tokens=4, tools=[tool], tool_choice="none")) == "The capital of France"


def check_min_tokens() -> None:
    answer = ask(max_tokens=10, extra_body={"min_tokens": 10})
    assert answer.usage.completion_tokens == 10
    assert content(answer).startswith(ANSWER)


def check_ignore_eos() -> None:
    answer = ask(max_tokens=10, extra_body={"ignore_eos": True})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 10)


def check_skip_special_tokens() -> None:
    shown = ask(extra_body={"skip_special_tokens": False, "no_stop_trim": True})
    assert content(shown) == ANSWER + "<|im_end|>"


def check_rid_is_the_id() -> None:
    rid = f"mine-{time.time_ns()}"
    assert ask(max_tokens=1, extra_body={"rid": rid}).id == rid


def check_null_means_not_given() -> None:
    names = ("stop", "n", "seed", "top_p", "logit_bias", "user", "response_format", "logprobs")
    nulls = dict.fromkeys(names)
    assert content(ask(max_tokens=4, extra_body=nulls)) == "The capital of France"
