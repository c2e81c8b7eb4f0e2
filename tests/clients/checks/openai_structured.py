"""openai: answers that must match something."""

from __future__ import annotations

import enum
import json
import re
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field

from checks.common import (
    ANSWER,
    EMOJI,
    PERSON_FORMAT,
    PERSON_SCHEMA,
    SHORT,
    TEXT,
    WANTS_JSON,
    is_person,
)
from checks.openai_client import client, content, newest, raised

FIELDS = SHORT | {"messages": WANTS_JSON, "max_tokens": 20}


class Person(BaseModel):
    age: int = Field(ge=0, le=99)


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Wheel(BaseModel):
    inches: Literal[26, 28]


class Bicycle(BaseModel):
    color: Color
    bell: bool
    owner: Literal["me"] | None
    wheels: list[Wheel] = Field(min_length=2, max_length=2)


def ask(**fields: Any) -> Any:
    return client.chat.completions.create(**(FIELDS | fields))


def parse(**fields: Any) -> Any:
    return newest(client).parse(**(FIELDS | fields))


def check_json_object() -> None:
    answer = ask(response_format={"type": "json_object"}, max_tokens=16, stop=",")
    assert re.match(r'\{\s*"name":\s*"', content(answer))


def check_json_schema() -> None:
    answer = ask(response_format=PERSON_FORMAT)
    assert is_person(json.loads(content(answer)))
    assert answer.choices[0].finish_reason == "stop"


def check_json_schema_at_high_temperature() -> None:
    answer = ask(response_format=PERSON_FORMAT, temperature=1.5, n=2, seed=1)
    assert all(is_person(json.loads(choice.message.content)) for choice in answer.choices)


def check_parse() -> None:
    [choice] = parse(response_format=Person).choices
    assert isinstance(choice.message.parsed, Person)
    assert choice.message.parsed == Person.model_validate_json(choice.message.content)
    assert choice.message.refusal is None


def check_parse_with_nested_models() -> None:
    bicycle = parse(response_format=Bicycle, max_tokens=60).choices[0].message.parsed
    assert isinstance(bicycle, Bicycle)
    assert isinstance(bicycle.color, Color)
    assert len(bicycle.wheels) == 2
    assert {wheel.inches for wheel in bicycle.wheels} <= {26, 28}


def check_parse_tells_when_it_was_cut() -> None:
    try:
        parse(response_format=Person, max_tokens=3)
    except openai.LengthFinishReasonError:
        return
    raise AssertionError("the answer cannot be complete")


def check_parse_of_an_answer_that_just_fits() -> None:
    num_tokens = ask(response_format=PERSON_FORMAT).usage.completion_tokens
    answer = parse(response_format=PERSON_FORMAT | {}, max_tokens=num_tokens)
    assert answer.choices[0].finish_reason == "stop"
    assert is_person(json.loads(content(answer)))


def check_parse_without_a_format() -> None:
    [choice] = parse(messages=SHORT["messages"], max_tokens=12).choices
    assert (choice.message.content, choice.message.parsed) == (ANSWER, None)


def check_regex() -> None:
    assert re.fullmatch("[0-9]{3}", content(ask(extra_body={"regex": "[0-9]{3}"})))
    assert content(ask(extra_body={"guided_regex": EMOJI})) == EMOJI


def check_ebnf() -> None:
    grammar = 'root ::= ("yes" | "no") "!"'
    assert content(ask(extra_body={"ebnf": grammar})) in ("yes!", "no!")
    assert content(ask(extra_body={"guided_grammar": grammar})) in ("yes!", "no!")


def check_choices() -> None:
    animals = ["cat", "dog"]
    for body in ({"guided_choice": animals}, {"structured_outputs": {"choice": animals}}):
        assert content(ask(extra_body=body)) in animals


def check_guided_json() -> None:
    for body in ({"guided_json": PERSON_SCHEMA}, {"structured_outputs": {"json": PERSON_SCHEMA}}):
        assert is_person(json.loads(content(ask(extra_body=body))))


def check_a_grammar_for_a_text_completion() -> None:
    answer = client.completions.create(**(TEXT | {"extra_body": {"regex": " (Rome|Oslo)"}}))
    assert answer.choices[0].text in (" Rome", " Oslo")


def check_logprobs_under_a_grammar() -> None:
    [choice] = ask(extra_body={"regex": "[0-9]{3}"}, logprobs=True, top_logprobs=1).choices
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(token.logprob <= token.top_logprobs[0].logprob for token in tokens)


def check_wrong_grammars_are_refused() -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("response_format", {"response_format": {"type": "xml"}}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("guided_choice", {"extra_body": {"guided_choice": []}}),
        ("regex", {"extra_body": {"regex": "a"}, "response_format": {"type": "json_object"}}),
    ]
    for param, fields in wrong:
        error = raised(openai.BadRequestError, ask, **fields)
        assert error.param == param, error
    error = raised(openai.BadRequestError, ask, extra_body={"regex": "("})
    assert 'invalid regex "("' in error.message
