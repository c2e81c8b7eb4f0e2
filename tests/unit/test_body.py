"""Bodies to types: every refusal is a sentence that names the field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from sgl.errors import InvalidRequestError
from sgl.protocol.body import convert


class Inner(msgspec.Struct, kw_only=True):
    role: Literal["user", "system"]
    words: Annotated[list[str], Meta(max_length=2)] = []


class Body(msgspec.Struct, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=3)]
    share: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    count: int | list[int] | None = None
    inner: list[Inner] = []
    bias: Annotated[dict[Annotated[str, Meta(max_length=2)], Bias], Meta(max_length=2)] | None = (
        None
    )


Bias = Annotated[float, Meta(ge=-1.0, le=1.0)]


@pytest.mark.parametrize(
    ("fields", "sentence", "param"),
    [
        ({}, "name must be given", "name"),
        ({"name": 5}, "name must be a string, got an integer", "name"),
        ({"name": ""}, "name must have at least 1 characters, got 0", "name"),
        ({"name": "abcd"}, "name must have at most 3 characters, got 4", "name"),
        ({"share": 0}, "share must be above 0, got 0", "share"),
        ({"share": 1.5}, "share must be at most 1, got 1.5", "share"),
        ({"share": "x"}, "share must be a number or null, got a string", "share"),
        ({"count": "x"}, "count must be an integer or an array or null, got a string", "count"),
        ({"count": [1, None]}, "count[1] must be an integer, got null", "count[1]"),
        ({"inner": [{}]}, "inner[0].role must be given", "inner[0].role"),
        (
            {"inner": [{"role": "king"}]},
            "inner[0].role: Invalid enum value 'king'",
            "inner[0].role",
        ),
        (
            {"inner": [{"role": "user", "words": ["a"] * 3}]},
            "inner[0].words must have at most 2 entries, got 3",
            "inner[0].words",
        ),
        ({"bias": {"a": 5}}, "a value of bias must be at most 1", "bias"),
        ({"bias": {"abc": 1}}, "a key of bias must have at most 2 characters", "bias"),
        ({"bias": {"a": 1, "b": 1, "c": 1}}, "bias must have at most 2 entries, got 3", "bias"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    fields: dict[str, Any], sentence: str, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert({"name": "a"} | fields if fields else {}, Body)
    assert (str(caught.value), caught.value.param) == (sentence, param)


def test_what_is_right_or_not_known_is_let_through() -> None:
    fields = {"name": "abc", "share": 1, "inner": [{"role": "user"}], "x": 1, "bias": {"1": -1}}
    body = convert(fields, Body)
    assert (body.share, body.inner[0].role, body.bias) == (1.0, "user", {"1": -1.0})


def test_the_texts_of_a_query_are_read_as_numbers_where_numbers_are_wanted() -> None:
    body = convert({"name": "5", "share": "0.5", "count": "3"}, Body, is_text=True)
    assert (body.name, body.share, body.count) == ("5", 0.5, 3)
    with pytest.raises(InvalidRequestError, match="share must be at most 1, got 2"):
        convert({"name": "5", "share": "2"}, Body, is_text=True)
