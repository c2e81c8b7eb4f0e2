"""Types as JSON schemas: descriptions come from the tables in docstrings."""

from __future__ import annotations

from typing import NotRequired, TypedDict

import msgspec

from sgl.protocol.json_schema import field_texts, schemas_of


class Base(msgspec.Struct, kw_only=True):
    """What both have.

    one         the first,
                which goes on
    two, three  these two
    """

    one: int = 1
    two: str | None = None
    three: str | None = None


class Child(Base, kw_only=True):
    """A child. It has
    a sentence on two lines.

    two   its own
    """

    four: list[Told] = []
    top_k: int | None = -1


class Told(TypedDict):
    """An answer."""

    text: str
    more: NotRequired[int]


def test_a_field_is_described_by_the_nearest_class() -> None:
    texts = field_texts(Child)
    assert texts["one"] == "the first, which goes on"
    assert (texts["two"], texts["three"]) == ("its own", "these two")
    assert texts["top_k"].startswith("draw from so many")  # as the sampling parameter


def test_schemas_have_descriptions_and_no_default_that_means_nothing() -> None:
    [schema], components = schemas_of([list[Child]])
    assert schema["items"] == {"$ref": "#/components/schemas/Child"}
    child = components["Child"]
    assert child["description"] == "A child. It has a sentence on two lines."
    assert child["properties"]["one"] == {
        "type": "integer",
        "default": 1,
        "description": "the first, which goes on",
    }
    assert "default" not in child["properties"]["two"]
    assert child["properties"]["four"]["items"] == {"$ref": "#/components/schemas/Told"}
    assert components["Told"]["required"] == ["text"]
