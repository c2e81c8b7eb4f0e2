"""litellm: the provider openai/, for chat and for text completions."""

from __future__ import annotations

import json
from typing import Any

import litellm
from pydantic import BaseModel, Field

import sgl
from checks.common import (
    ANSWER,
    API_KEY,
    BASE_URL,
    EMOJI,
    ITALIAN_COMPLETION,
    ITALY,
    MESSAGES,
    NUM_ANSWER_TOKENS,
    NUM_QUESTION_TOKENS,
    PERSON_FORMAT,
    PROMPT,
    TIMEOUT_S,
    TOO_LONG,
    VARIED_CHAT,
    WANTS_JSON,
    is_person,
)

SERVER: dict[str, Any] = {
    "model": "openai/default",
    "api_base": BASE_URL,
    "api_key": API_KEY,
    "num_retries": 0,
    "max_retries": 0,
    "timeout": TIMEOUT_S,
}
CHAT = SERVER | {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
TEXT = SERVER | {
    "model": "text-completion-openai/default",
    "prompt": PROMPT,
    "temperature": 0,
    "max_tokens": 2,
}


class Person(BaseModel):
    age: int = Field(ge=0, le=99)


def ask(**fields: Any) -> Any:
    return litellm.completion(**(CHAT | fields))


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def raised(kind: type[Exception], **fields: Any) -> Any:
    error: Any = None
    try:
        ask(**fields)
    except Exception as caught:
        error = caught
    assert type(error) is kind, repr(error)
    return error


def check_completion() -> None:
    answer = ask()
    assert text_of(answer) == ANSWER
    assert (answer.choices[0].finish_reason, answer.model) == ("stop", "default")
    assert answer.id.startswith("chatcmpl-")


def check_usage() -> None:
    usage = ask().usage
    expected = (NUM_QUESTION_TOKENS, NUM_ANSWER_TOKENS)
    assert (usage.prompt_tokens, usage.completion_tokens) == expected
    assert usage.total_tokens == sum(expected)
    assert ask().usage.prompt_tokens_details.cached_tokens == NUM_QUESTION_TOKENS - 1


def check_cost() -> None:
    prices = {"input_cost_per_token": 0.5, "output_cost_per_token": 2.0}
    cost = litellm.completion_cost(ask(), custom_cost_per_token=prices)
    assert cost == NUM_QUESTION_TOKENS * 0.5 + NUM_ANSWER_TOKENS * 2.0


def check_stream() -> None:
    chunks = list(ask(stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


def check_stream_put_together() -> None:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert text_of(whole) == ANSWER
    assert whole.usage.total_tokens == NUM_QUESTION_TOKENS + NUM_ANSWER_TOKENS


def check_emoji_in_a_stream() -> None:
    chunks = ask(stream=True, max_tokens=20, extra_body={"regex": EMOJI})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == EMOJI


async def check_acompletion() -> None:
    assert text_of(await litellm.acompletion(**CHAT)) == ANSWER


async def check_async_stream() -> None:
    chunks = await litellm.acompletion(**CHAT, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in chunks]
    assert "".join(pieces) == ANSWER


def check_batch_completion() -> None:
    answers = litellm.batch_completion(**(CHAT | {"messages": [MESSAGES] * 3}))
    assert [text_of(answer) for answer in answers] == [ANSWER] * 3


def check_parameters() -> None:
    assert text_of(ask(stop=["Paris"])) == "The capital of France is "
    assert text_of(ask(max_tokens=2, logit_bias={"7042": 100})) == " Paris Paris"
    assert text_of(ask(max_completion_tokens=2)) == "The capital"


def check_seed_and_n() -> None:
    fields = VARIED_CHAT | {"model": SERVER["model"], "n": 2}
    first, again, other = (
        [choice.message.content for choice in ask(**fields, seed=seed).choices]
        for seed in (1, 1, 4)
    )
    assert first == again != other
    assert len(set(first)) == 2


def check_logprobs() -> None:
    told = ask(logprobs=True, top_logprobs=2, max_tokens=2).choices[0].logprobs.content
    assert [token.token for token in told] == ["The", " capital"]
    assert {len(token.top_logprobs) for token in told} == {2}


def check_fields_of_this_server() -> None:
    """Named ones in extra_body, and also as they are."""
    body = {"top_k": 1, "stop_token_ids": [30]}
    assert text_of(ask(temperature=1.8, extra_body=body)) == ANSWER.removesuffix(".")
    assert text_of(ask(temperature=1.8, top_k=1, stop_token_ids=[30])) == ANSWER.removesuffix(".")


def check_json_schema() -> None:
    answer = ask(messages=WANTS_JSON, response_format=PERSON_FORMAT, max_tokens=20)
    assert is_person(json.loads(text_of(answer)))


def check_a_model_as_format() -> None:
    answer = ask(messages=WANTS_JSON, response_format=Person, max_tokens=20)
    assert Person.model_validate_json(text_of(answer))


def check_text_completion() -> None:
    answer = litellm.text_completion(**TEXT)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" Paris.", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 2)
    by_chat = litellm.text_completion(**(TEXT | {"model": "openai/default"}))
    assert by_chat.choices[0].text == " Paris."


def check_several_texts() -> None:
    answer = litellm.text_completion(**(TEXT | {"prompt": [PROMPT, ITALY]}))
    assert [choice.text for choice in answer.choices] == [" Paris.", ITALIAN_COMPLETION]


def check_streamed_text() -> None:
    chunks = litellm.text_completion(**TEXT, stream=True)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == " Paris."


def check_the_provider_of_vllm() -> None:
    assert text_of(ask(model="hosted_vllm/default")) == ANSWER


def check_router() -> None:
    parameters = {name: SERVER[name] for name in ("model", "api_base", "api_key")}
    router = litellm.Router([{"model_name": "small", "litellm_params": parameters}])
    answer = router.completion("small", MESSAGES, temperature=0, max_tokens=2)
    assert text_of(answer) == "The capital"


def check_models() -> None:
    names = litellm.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="openai",
        api_base=BASE_URL,
        api_key=API_KEY,
    )
    assert names == ["demo/SmolLM2-135M-Instruct"]


def check_errors() -> None:
    error = raised(litellm.BadRequestError, temperature=-1)
    assert (error.status_code, error.param) == (400, "temperature")
    assert raised(litellm.AuthenticationError, api_key="sk-wrong").status_code == 401
    raised(litellm.Timeout, timeout=1e-3)
    raised(litellm.BadRequestError, temperature=-1, stream=True)


def check_an_overflow_is_recognised() -> None:
    too_long = [{"role": "user", "content": TOO_LONG}]
    raised(litellm.ContextWindowExceededError, messages=too_long)


def check_program() -> None:
    backend = sgl.LiteLLM(
        "openai/default", api_key=API_KEY, base_url=BASE_URL, timeout=TIMEOUT_S, max_retries=0
    )

    @sgl.function
    def ask(s):
        s += sgl.user(MESSAGES[0]["content"])
        s += sgl.assistant(sgl.gen("answer", max_tokens=12, temperature=0))

    assert ask.run(backend=backend)["answer"] == ANSWER
    streamed = ask.run(backend=backend, stream=True)
    assert "".join(streamed.text_iter("answer")) == ANSWER
    assert backend.token_usage.prompt_tokens >= NUM_QUESTION_TOKENS
