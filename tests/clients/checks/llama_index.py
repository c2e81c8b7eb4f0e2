"""llama-index-llms-openai-like: chat models and text completions."""

from __future__ import annotations

from typing import Any

import openai
from llama_index.core.llms import ChatMessage, MessageRole, TextBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

from checks.common import (
    ANSWER,
    API_KEY,
    BASE_URL,
    EMOJI,
    MODEL,
    NUM_ANSWER_TOKENS,
    NUM_QUESTION_TOKENS,
    PROMPT,
    QUESTION,
    TIMEOUT_S,
    TOPIC,
    WANTS_JSON,
)

SERVER: dict[str, Any] = {
    "model": MODEL,
    "api_base": BASE_URL,
    "api_key": API_KEY,
    "context_window": 8192,
    "temperature": 0,
    "max_retries": 0,
    "timeout": TIMEOUT_S,
}
chat = OpenAILike(**SERVER, is_chat_model=True, max_tokens=12)
async_chat = OpenAILike(**SERVER, is_chat_model=True, max_tokens=12)
text = OpenAILike(**SERVER, is_chat_model=False, max_tokens=2)
async_text = OpenAILike(**SERVER, is_chat_model=False, max_tokens=2)
ASKED = [ChatMessage(role="user", content=QUESTION)]


class Person(BaseModel):
    age: int = Field(ge=0, le=99)


def other(**fields: Any) -> OpenAILike:
    return OpenAILike(**(SERVER | {"is_chat_model": True, "max_tokens": 12} | fields))


def check_complete() -> None:
    answer = chat.complete(QUESTION)
    assert answer.text == ANSWER
    assert answer.raw.choices[0].finish_reason == "stop"


def check_chat() -> None:
    answer = chat.chat(ASKED)
    assert (answer.message.role, answer.message.content) == (MessageRole.ASSISTANT, ANSWER)


def check_usage() -> None:
    told = chat.chat(ASKED)
    expected = (NUM_QUESTION_TOKENS, NUM_ANSWER_TOKENS)
    assert (told.raw.usage.prompt_tokens, told.raw.usage.completion_tokens) == expected
    assert told.additional_kwargs["total_tokens"] == sum(expected)


def check_turns_and_blocks() -> None:
    head, tail = QUESTION[:10], QUESTION[10:]
    asked = ChatMessage(role="user", blocks=[TextBlock(text=head), TextBlock(text=tail)])
    turns = [
        ChatMessage(role="system", content="You are a pirate."),
        asked,
        ChatMessage(role="assistant", content=ANSWER),
        ChatMessage(role="user", content="And of Italy?"),
    ]
    assert "Italy" in chat.chat(turns).message.content


def check_stream_complete() -> None:
    pieces = list(chat.stream_complete(QUESTION))
    assert "".join(piece.delta for piece in pieces) == pieces[-1].text == ANSWER


def check_stream_chat() -> None:
    pieces = list(chat.stream_chat(ASKED))
    assert "".join(piece.delta for piece in pieces) == pieces[-1].message.content == ANSWER
    assert len(pieces) >= NUM_ANSWER_TOKENS


def check_stream_with_usage() -> None:
    model = other(additional_kwargs={"stream_options": {"include_usage": True}})
    *_, last = model.stream_chat(ASKED)
    assert last.raw.usage.completion_tokens == NUM_ANSWER_TOKENS
    assert last.message.content == ANSWER


def check_emoji_in_a_stream() -> None:
    model = other(max_tokens=20, additional_kwargs={"extra_body": {"regex": EMOJI}})
    assert "".join(piece.delta for piece in model.stream_chat(ASKED)) == EMOJI


async def check_async() -> None:
    assert (await async_chat.acomplete(QUESTION)).text == ANSWER
    assert (await async_chat.achat(ASKED)).message.content == ANSWER


async def check_async_streams() -> None:
    pieces = [piece.delta async for piece in await async_chat.astream_complete(QUESTION)]
    assert "".join(pieces) == ANSWER
    pieces = [piece.delta async for piece in await async_chat.astream_chat(ASKED)]
    assert "".join(pieces) == ANSWER


def check_text() -> None:
    answer = text.complete(PROMPT)
    assert answer.text == " Paris."
    assert answer.additional_kwargs["total_tokens"] == 7


def check_streamed_text() -> None:
    pieces = list(text.stream_complete(PROMPT))
    assert "".join(piece.delta for piece in pieces) == pieces[-1].text == " Paris."


async def check_async_text() -> None:
    assert (await async_text.acomplete(PROMPT)).text == " Paris."
    pieces = [piece.delta async for piece in await async_text.astream_complete(PROMPT)]
    assert "".join(pieces) == " Paris."


def check_chat_of_a_text_model() -> None:
    """It makes a prompt of its own of the messages."""
    answer = text.chat(ASKED)
    assert answer.message.role == MessageRole.ASSISTANT
    assert answer.message.content == answer.raw.choices[0].text != ""


def check_stop() -> None:
    assert chat.complete(QUESTION, stop=["Paris"]).text == "The capital of France is "


def check_seed() -> None:
    def sampled(seed: int) -> str:
        model = other(temperature=1, max_tokens=4, additional_kwargs={"seed": seed, "top_p": 0.8})
        return str(model.complete(TOPIC).text)

    assert sampled(1) == sampled(1) != sampled(4)


def check_extra_body() -> None:
    answer = chat.complete(QUESTION, extra_body={"stop_token_ids": [30], "top_k": 1})
    assert answer.text == ANSWER.removesuffix(".")


def check_logprobs() -> None:
    told = other(logprobs=True, top_logprobs=2, max_tokens=2).chat(ASKED).logprobs
    assert [row[0].token for row in told] == ["The", " capital"]
    assert all(len(row) == 2 and row[0].logprob > row[1].logprob for row in told)


def check_structured_answers() -> None:
    model = other(max_tokens=20, should_use_structured_outputs=True)
    wanted = WANTS_JSON[0]["content"]
    person = model.as_structured_llm(Person).complete(wanted).raw
    assert isinstance(person, Person)
    assert isinstance(model.structured_predict(Person, PromptTemplate(wanted)), Person)


def check_errors() -> None:
    wrong = ((openai.AuthenticationError, {"api_key": "sk-wrong"}), (openai.BadRequestError, {}))
    for kind, fields in wrong:
        error: Any = None
        try:
            other(**fields).complete(QUESTION, n=0)
        except openai.APIError as caught:
            error = caught
        assert type(error) is kind, repr(error)
    assert error.param == "n"
