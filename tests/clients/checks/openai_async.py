"""openai: the async client, and many requests at once."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from pydantic import BaseModel, Field

from checks.common import (
    ANSWER,
    COMPLETION,
    EMOJI,
    NUM_ANSWER_TOKENS,
    NUM_QUESTION_TOKENS,
    SHORT,
    TEXT,
    WANTS_JSON,
)
from checks.openai_client import async_client, content, newest

create = async_client.chat.completions.create


class Person(BaseModel):
    age: int = Field(ge=0, le=99)


async def ask(**fields: Any) -> Any:
    return await create(**(SHORT | fields))


async def check_answer() -> None:
    answer = await ask()
    assert content(answer) == ANSWER
    assert answer.usage.completion_tokens == NUM_ANSWER_TOKENS


async def check_completion() -> None:
    answer = await async_client.completions.create(**TEXT)
    assert answer.choices[0].text == COMPLETION


async def check_stream() -> None:
    chunks = [chunk async for chunk in await ask(stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


async def check_emoji_in_a_stream() -> None:
    chunks = await ask(stream=True, max_tokens=20, extra_body={"regex": EMOJI})
    found = [chunk.choices[0].delta.content or "" async for chunk in chunks]
    assert "".join(found) == EMOJI


async def check_stream_helper() -> None:
    async with newest(async_client).stream(**SHORT) as events:
        deltas = [event.delta async for event in events if event.type == "content.delta"]
        final = await events.get_final_completion()
    assert "".join(deltas) == content(final) == ANSWER


async def check_parse() -> None:
    fields = SHORT | {"messages": WANTS_JSON, "max_tokens": 20}
    answer = await newest(async_client).parse(**fields, response_format=Person)
    assert isinstance(answer.choices[0].message.parsed, Person)


async def check_32_at_once() -> None:
    answers = await asyncio.gather(*(ask(max_tokens=3) for _ in range(32)))
    assert {content(answer) for answer in answers} == {"The capital of"}
    assert len({answer.id for answer in answers}) == 32
    assert {answer.usage.total_tokens for answer in answers} == {NUM_QUESTION_TOKENS + 3}


async def check_different_requests_at_once() -> None:
    """Each gets its own answer, whatever the others ask for."""

    async def counted(number: int) -> tuple[str, int]:
        answer = await ask(max_tokens=number, extra_body={"regex": f"({number})+"})
        return content(answer), answer.usage.completion_tokens

    found = await asyncio.gather(*(counted(number) for number in range(1, 9)))
    for number, (text, num_tokens) in enumerate(found, start=1):
        assert set(text) == {str(number)}
        assert num_tokens <= number


async def check_streams_at_once() -> None:
    async def joined() -> str:
        chunks = await ask(stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    assert set(await asyncio.gather(*(joined() for _ in range(8)))) == {ANSWER}


async def check_cancelling_a_request() -> None:
    task = asyncio.create_task(ask(max_tokens=2000, extra_body={"ignore_eos": True}))
    await asyncio.sleep(0.3)
    task.cancel()
    results = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert content(await ask(max_tokens=2)) == "The capital"


async def check_leaving_a_stream() -> None:
    chunks = await ask(stream=True, max_tokens=2000, extra_body={"ignore_eos": True})
    async for chunk in chunks:
        if chunk.choices[0].delta.content:
            break
    await chunks.close()
    assert content(await ask(max_tokens=2)) == "The capital"


async def check_errors() -> None:
    for fields, kind in (
        ({"n": 0}, openai.BadRequestError),
        ({"timeout": 1e-3}, openai.APITimeoutError),
    ):
        [error] = await asyncio.gather(ask(**fields), return_exceptions=True)
        assert type(error) is kind, error


async def check_models_and_files() -> None:
    [model] = [model async for model in async_client.models.list()]
    assert (await async_client.models.retrieve(model.id)).id == model.id
    file = await async_client.files.create(file=("x.jsonl", b"{}"), purpose="batch")
    assert (await async_client.files.content(file.id)).text == "{}"
    assert (await async_client.files.delete(file.id)).deleted
