"""langchain-openai: ChatOpenAI for chat, OpenAI for text completions."""

from __future__ import annotations

from typing import Any

import openai
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

from checks.common import (
    ANSWER,
    API_KEY,
    BASE_URL,
    EMOJI,
    ITALIAN_COMPLETION,
    ITALY,
    MODEL,
    NUM_ANSWER_TOKENS,
    NUM_QUESTION_TOKENS,
    PERSON_SCHEMA,
    PROMPT,
    QUESTION,
    TIMEOUT_S,
    TOO_LONG,
    TOPIC,
    VARIED,
    WANTS_JSON,
    is_person,
)

SERVER: dict[str, Any] = {
    "base_url": BASE_URL,
    "api_key": API_KEY,
    "model": MODEL,
    "temperature": 0,
    "max_retries": 0,
    "timeout": TIMEOUT_S,
}
chat = ChatOpenAI(**SERVER, max_tokens=12)
text = OpenAI(**SERVER, max_tokens=2)
WANTED = WANTS_JSON[0]["content"]


class Person(BaseModel):
    age: int = Field(ge=0, le=99)


def other(**fields: Any) -> ChatOpenAI:
    return ChatOpenAI(**(SERVER | {"max_tokens": 12} | fields))


def raised(kind: type[Exception], model: ChatOpenAI, asked: str = QUESTION) -> Any:
    error: Any = None
    try:
        model.invoke(asked)
    except Exception as caught:
        error = caught
    assert isinstance(error, kind), repr(error)
    return error


def check_invoke() -> None:
    answer = chat.invoke(QUESTION)
    assert isinstance(answer, AIMessage)
    assert (answer.content, answer.tool_calls) == (ANSWER, [])
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == MODEL


def check_usage() -> None:
    usage = chat.invoke(QUESTION).usage_metadata
    assert (usage["input_tokens"], usage["output_tokens"]) == (
        NUM_QUESTION_TOKENS,
        NUM_ANSWER_TOKENS,
    )
    assert usage["total_tokens"] == NUM_QUESTION_TOKENS + NUM_ANSWER_TOKENS
    again = chat.invoke(QUESTION).usage_metadata
    assert again["input_token_details"]["cache_read"] == NUM_QUESTION_TOKENS - 1


def check_messages() -> None:
    answer = chat.invoke(
        [
            SystemMessage("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
            HumanMessage([{"type": "text", "text": QUESTION}]),
        ]
    )
    assert answer.content == ANSWER
    assert answer.usage_metadata["input_tokens"] == NUM_QUESTION_TOKENS
    turns = [HumanMessage(QUESTION), AIMessage(ANSWER), HumanMessage("And of Italy?")]
    assert "Italy" in chat.invoke(turns).content


def check_stream() -> None:
    chunks = list(chat.stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    assert len(chunks) >= NUM_ANSWER_TOKENS
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole, AIMessageChunk)
    assert whole.response_metadata["finish_reason"] == "stop"


def check_stream_with_usage() -> None:
    usages = [chunk.usage_metadata for chunk in other(stream_usage=True).stream(QUESTION)]
    [usage] = [usage for usage in usages if usage]
    assert (usage["input_tokens"], usage["output_tokens"]) == (
        NUM_QUESTION_TOKENS,
        NUM_ANSWER_TOKENS,
    )


def check_emoji_in_a_stream() -> None:
    model = other(max_tokens=20, extra_body={"regex": EMOJI})
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == EMOJI


def check_batch() -> None:
    answers = chat.batch([QUESTION, QUESTION.replace("France", "Italy")])
    assert [answer.content for answer in answers] == [ANSWER, "The capital of Italy is Rome."]


async def check_ainvoke() -> None:
    assert (await chat.ainvoke(QUESTION)).content == ANSWER


async def check_astream() -> None:
    chunks = [chunk.content async for chunk in chat.astream(QUESTION)]
    assert "".join(chunks) == ANSWER


async def check_abatch() -> None:
    answers = await chat.abatch([QUESTION] * 4)
    assert {answer.content for answer in answers} == {ANSWER}


async def check_events() -> None:
    events = [event async for event in chat.astream_events(QUESTION, version="v2")]
    assert [events[0]["event"], events[-1]["event"]] == ["on_chat_model_start", "on_chat_model_end"]
    told = [event["data"]["chunk"] for event in events if "stream" in event["event"]]
    assert "".join(chunk.content for chunk in told) == ANSWER


def check_callbacks() -> None:
    class Listener(BaseCallbackHandler):
        tokens: list[str] = []  # noqa: RUF012
        ends: list[Any] = []  # noqa: RUF012

        def on_llm_new_token(self, token: str, **more: Any) -> None:
            self.tokens.append(token)

        def on_llm_end(self, response: Any, **more: Any) -> None:
            self.ends.append(response)

    listener = Listener()
    list(chat.stream(QUESTION, config={"callbacks": [listener]}))
    assert "".join(listener.tokens) == ANSWER
    assert listener.ends[0].generations[0][0].text == ANSWER


def check_chain() -> None:
    template = ChatPromptTemplate.from_messages(
        [("user", "What is the capital of {country}? Answer in one sentence.")]
    )
    chain = template | chat | StrOutputParser()
    assert chain.invoke({"country": "France"}) == ANSWER
    assert "".join(chain.stream({"country": "France"})) == ANSWER


def check_stop_and_seed() -> None:
    stopped = chat.bind(stop=["Paris"]).invoke(QUESTION)
    assert stopped.content == "The capital of France is "
    varied = other(**VARIED)
    first, again, third = (varied.bind(seed=seed).invoke(TOPIC).content for seed in (1, 1, 4))
    assert first == again != third


def check_n() -> None:
    result = other(**VARIED, n=2, seed=1).generate([[HumanMessage(TOPIC)]])
    texts = [generation.text for generation in result.generations[0]]
    assert len(set(texts)) == 2
    assert result.llm_output["token_usage"]["completion_tokens"] == 8


def check_logprobs() -> None:
    answer = other(logprobs=True, top_logprobs=2).invoke(QUESTION)
    tokens = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens[:-1]) == ANSWER
    assert {len(token["top_logprobs"]) for token in tokens} == {2}


def check_extra_body() -> None:
    model = other(temperature=1.8, extra_body={"top_k": 1, "stop_token_ids": [30]})
    assert model.invoke(QUESTION).content == ANSWER.removesuffix(".")


def check_structured_output() -> None:
    model = other(max_tokens=20).with_structured_output(Person)
    assert isinstance(model.invoke(WANTED), Person)


def check_structured_output_of_a_schema() -> None:
    schema = {"title": "person", "description": "a person", **PERSON_SCHEMA}
    model = other(max_tokens=20).with_structured_output(schema, method="json_schema", strict=True)
    assert is_person(model.invoke(WANTED))


def check_structured_output_with_its_message() -> None:
    model = other(max_tokens=20).with_structured_output(Person, include_raw=True)
    found = model.invoke(WANTED)
    assert found["parsing_error"] is None
    assert found["parsed"] == Person.model_validate_json(found["raw"].content)


def check_streamed_structured_output() -> None:
    *_, person = other(max_tokens=20).with_structured_output(Person).stream(WANTED)
    assert isinstance(person, Person)


def check_json_mode() -> None:
    model = other(max_tokens=40).with_structured_output(None, method="json_mode")
    found = model.bind(stop=["\n\n"]).invoke("Give me a person as JSON with the keys name and age.")
    assert isinstance(found, dict)


def check_text() -> None:
    assert text.invoke(PROMPT) == " Paris."
    assert "".join(text.stream(PROMPT)) == " Paris."


def check_several_texts() -> None:
    assert text.batch([PROMPT, ITALY]) == [" Paris.", ITALIAN_COMPLETION]
    result = text.generate([PROMPT, ITALY])
    assert [row[0].text for row in result.generations] == [" Paris.", ITALIAN_COMPLETION]
    assert result.llm_output["token_usage"]["total_tokens"] == 14


async def check_text_async() -> None:
    assert await text.ainvoke(PROMPT) == " Paris."
    assert "".join([piece async for piece in text.astream(PROMPT)]) == " Paris."


def check_errors() -> None:
    error = raised(openai.BadRequestError, other(temperature=-1))
    assert error.param == "temperature"
    assert raised(openai.AuthenticationError, other(api_key="sk-wrong")).status_code == 401
    assert raised(openai.APITimeoutError, other(timeout=1e-3))


def check_an_overflow_is_recognised() -> None:
    error = raised(ContextOverflowError, chat, TOO_LONG)
    assert error.code == "context_length_exceeded"
