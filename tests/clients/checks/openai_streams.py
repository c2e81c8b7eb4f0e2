"""openai: streams, and the helpers that put their pieces together."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
from pydantic import BaseModel, Field

from checks.common import (
    ANSWER,
    NUM_ANSWER_TOKENS,
    NUM_QUESTION_TOKENS,
    SHORT,
    TEXT,
    VARIED_CHAT,
    WANTS_JSON,
)
from checks.openai_client import client, content, newest, raised, wait_until

WITH_USAGE = {"stream_options": {"include_usage": True}}
LONG: dict[str, Any] = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}


class Person(BaseModel):
    age: int = Field(ge=0, le=99)


def stream(**fields: Any) -> list[Any]:
    return list(client.chat.completions.create(**(SHORT | fields), stream=True))


def pieces(chunks: list[Any], index: int = 0) -> list[str]:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return [choice.delta.content or "" for choice in choices]


def check_pieces_are_the_answer() -> None:
    found = pieces(stream())
    assert "".join(found) == ANSWER
    assert len(found) >= NUM_ANSWER_TOKENS - 1, "token by token"


def check_the_role_comes_first_and_once() -> None:
    deltas = [chunk.choices[0].delta for chunk in stream(max_tokens=3)]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert {delta.role for delta in deltas[1:]} == {None}


def check_the_reason_comes_last_and_once() -> None:
    reasons = [chunk.choices[0].finish_reason for chunk in stream()]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert stream(max_tokens=2)[-1].choices[0].finish_reason == "length"


def check_chunks_of_one_answer_say_so() -> None:
    chunks = stream(max_tokens=3, **WITH_USAGE)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert (chunks[0].object, chunks[0].model) == ("chat.completion.chunk", "default")


def check_usage_is_the_last_chunk() -> None:
    *chunks, last = stream(**WITH_USAGE)
    assert {chunk.usage for chunk in chunks} == {None}
    assert last.choices == []
    assert last.usage.prompt_tokens == NUM_QUESTION_TOKENS
    assert last.usage.completion_tokens == NUM_ANSWER_TOKENS
    assert last.usage.total_tokens == NUM_QUESTION_TOKENS + NUM_ANSWER_TOKENS
    assert last.usage.model_dump()["prompt_tokens_details"]["cached_tokens"] > 0


def check_no_usage_unless_asked() -> None:
    chunks = stream(max_tokens=2)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def check_several_answers_in_one_stream() -> None:
    fields = VARIED_CHAT | {"n": 2, "seed": 1}
    whole = client.chat.completions.create(**fields)
    chunks = stream(**fields)
    texts = ["".join(pieces(chunks, index)) for index in (0, 1)]
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]


def check_logprobs() -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    [choice] = client.chat.completions.create(**(SHORT | fields)).choices
    parts = [chunk.choices[0].logprobs for chunk in stream(**fields)]
    tokens = [token for part in parts if part is not None for token in part.content]
    assert [token.token for token in tokens] == [t.token for t in choice.logprobs.content]
    for told, whole in zip(tokens, choice.logprobs.content, strict=True):
        assert abs(told.logprob - whole.logprob) < 1e-3
        assert len(told.top_logprobs) == 2


def check_a_stop_text_is_never_shown() -> None:
    chunks = stream(stop="Paris")
    assert "".join(pieces(chunks)) == "The capital of France is "
    assert chunks[-1].choices[0].finish_reason == "stop"


def check_characters_are_never_cut() -> None:
    chunks = stream(max_tokens=60, extra_body={"regex": "[🙂🎉日]{9}"})  # nothing is forced
    assert len("".join(pieces(chunks))) == 9
    assert not any("\ufffd" in piece for piece in pieces(chunks))
    assert len([piece for piece in pieces(chunks) if piece]) > 5


def check_raw_events() -> None:
    """Each line is `data: `, the last one [DONE]; reasons are null, not empty."""
    raw = client.chat.completions.with_streaming_response
    with raw.create(**SHORT, stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"]
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all(event["usage"] is None for event in events)
    assert events[0]["choices"][0]["finish_reason"] is None


def check_leaving_a_stream_ends_its_request() -> None:
    """Its rid is free again long before 4000 tokens could be there, and the server goes on."""
    rid = f"left-{time.time_ns()}"
    fields = SHORT | LONG | {"extra_body": {"ignore_eos": True, "rid": rid}}
    with client.chat.completions.create(**fields, stream=True) as chunks:
        assert next(iter(chunks)).id == rid
        again = {"max_tokens": 1, "extra_body": {"rid": rid}}
        error = raised(openai.BadRequestError, create_short, **again)
        assert error.param == "rid"
    wait_until(lambda: is_answered(**again))
    assert content(create_short(max_tokens=2)) == "The capital"


def create_short(**fields: Any) -> Any:
    return client.chat.completions.create(**(SHORT | fields))


def is_answered(**fields: Any) -> bool:
    try:
        create_short(**fields)
    except openai.BadRequestError:
        return False
    return True


def check_a_wrong_request_is_refused_before_the_stream() -> None:
    error = raised(openai.BadRequestError, stream, temperature=-1)
    assert (error.param, error.status_code) == ("temperature", 400)
    error = raised(openai.BadRequestError, stream, extra_body={"regex": "("})
    assert "regex" in error.message


def check_stream_helper() -> None:
    with newest(client).stream(**SHORT, **WITH_USAGE) as events:
        kinds = {}
        for event in events:
            kinds.setdefault(event.type, []).append(event)
        final = events.get_final_completion()
    assert "".join(event.delta for event in kinds["content.delta"]) == ANSWER
    assert kinds["content.delta"][-1].snapshot == ANSWER
    assert [event.content for event in kinds["content.done"]] == [ANSWER]
    assert (content(final), final.choices[0].finish_reason) == (ANSWER, "stop")
    assert final.usage.completion_tokens == NUM_ANSWER_TOKENS


def check_stream_helper_parses() -> None:
    fields = SHORT | {"messages": WANTS_JSON, "max_tokens": 20}
    with newest(client).stream(**fields, response_format=Person) as events:
        final = events.get_final_completion()
    parsed = final.choices[0].message.parsed
    assert isinstance(parsed, Person)
    assert parsed == Person.model_validate_json(content(final))


def check_completions() -> None:
    chunks = list(client.completions.create(**TEXT, stream=True, **WITH_USAGE))
    *told, last = chunks
    assert "".join(chunk.choices[0].text for chunk in told) == " Paris."
    assert [chunk.choices[0].finish_reason for chunk in told] == [None, "length"]
    assert (last.choices, last.usage.total_tokens) == ([], 7)
    assert {chunk.object for chunk in chunks} == {"text_completion"}


def check_completions_with_echo_and_logprobs() -> None:
    fields = TEXT | {"echo": True, "logprobs": 1}
    [whole] = client.completions.create(**fields).choices
    told = [chunk.choices[0] for chunk in client.completions.create(**fields, stream=True)]
    assert "".join(choice.text for choice in told) == whole.text == TEXT["prompt"] + " Paris."
    parts = [choice.logprobs for choice in told if choice.logprobs is not None]
    for name in ("tokens", "text_offset"):
        joined = [value for part in parts for value in getattr(part, name)]
        assert joined == getattr(whole.logprobs, name)
