"""JSON schemas of every kind; a small model ends most of their answers within 80 tokens.

`SCHEMAS` by name: objects, arrays, numbers, texts, choices, references, some as people use them.
"""

from __future__ import annotations

from typing import Any

import jsonschema

Schema = dict[str, Any]


def validator_of(schema: Schema) -> jsonschema.Draft202012Validator:
    """Raises SchemaError for what is no schema. Its `validate` looks at formats, too."""
    jsonschema.Draft202012Validator.check_schema(schema)
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return jsonschema.Draft202012Validator(schema, format_checker=formats)


def text(least: int = 1, most: int = 12) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most}


def whole(least: int = 0, most: int = 99) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def matching(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def array(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def some(*required: str, **properties: Schema) -> Schema:
    """An object with `properties` and no others; those that are not `required` may be left out."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*required],
        "additionalProperties": False,
    }


def thing(**properties: Schema) -> Schema:
    return some(*properties, **properties)


BOOLEAN: Schema = {"type": "boolean"}
NOTHING: Schema = {"type": "null"}
SMALL_LETTERS = matching("^[a-z]{1,8}$")
HALVES = {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 20}
HUNDREDTHS = {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 999}

OBJECTS: dict[str, Schema] = {
    "person": thing(name=text(), age=whole(0, 150)),
    "three levels": thing(a=thing(b=thing(c=BOOLEAN))),
    "wide": thing(**{f"field_{number}": BOOLEAN for number in range(8)}),
    "all optional": some(red=whole(), green=whole(), blue=whole()),
    "some optional": some("id", id=whole(), name=text(), active=BOOLEAN, tag={"enum": ["a", "b"]}),
    "empty": some(),
    "keys of all languages": thing(
        größe={"enum": ["klein", "groß"]}, 名前=text(1, 6), ключ=BOOLEAN
    ),
    "keys with signs": thing(
        **{'say "hi"': BOOLEAN, "a\\b": whole(), "c/d.e": NOTHING, "": BOOLEAN}
    ),
    "counts by name": {
        "type": "object",
        "properties": {"total": whole()},
        "required": ["total"],
        "additionalProperties": whole(0, 9),
        "maxProperties": 3,
    },
    "keys by pattern": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,4}$": whole(), "^y_[0-9]{1,2}$": BOOLEAN},
        "additionalProperties": False,
        "maxProperties": 2,
    },
}

ARRAYS: dict[str, Schema] = {
    "colours": array({"enum": ["red", "green", "blue"]}, 2, 4),
    "none": array({}, 0, 0),
    "numbers": array(whole(-50, 50), 1, 5),
    "matrix": array(array(whole(0, 9), 2, 2), 2, 2),
    "people": array(thing(name=text(1, 8), born=whole(1900, 2024)), 1, 2),
    "pair": {
        "type": "array",
        "prefixItems": [whole(0, 9), text()],
        "items": False,
        "minItems": 2,
    },
    "pair and more": {
        "type": "array",
        "prefixItems": [{"const": "sum"}, BOOLEAN],
        "items": whole(0, 9),
        "minItems": 3,
        "maxItems": 5,
    },
    "mixed": array({"anyOf": [whole(), SMALL_LETTERS, NOTHING]}, 2, 4),
}

NUMBERS: dict[str, Schema] = {
    "halves": HALVES,
    "hundredths": thing(price=HUNDREDTHS),
    "fives": {"type": "integer", "multipleOf": 5, "minimum": 5, "maximum": 500},
    "between": {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 1000},
    "below zero": whole(-1000, -1),
    "any number from -1 to 1": thing(x={"type": "number", "minimum": -1, "maximum": 1}),
}

TEXTS: dict[str, Schema] = {
    "name": matching("^[A-Z][a-z]{2,8}$"),
    "number plate": matching(r"^[A-Z]{1,3}-[A-Z]{1,2} [1-9]\d{0,3}$"),
    "umlauts": matching("^[äöüß]{2,6}$"),
    "three letters": text(3, 3),
    "version": matching(r"^(0|[1-9]\d{0,2})\.(0|[1-9]\d{0,2})\.(0|[1-9]\d{0,2})(-rc\.[1-9])?$"),
    "hexadecimal": matching("^#[0-9a-f]{6}$"),
    "date": {"type": "string", "format": "date"},
    "date and time": {"type": "string", "format": "date-time"},
    "time": thing(at={"type": "string", "format": "time"}),
    "address in a network": thing(ip={"type": "string", "format": "ipv4"}, port=whole(1, 65535)),
    "identifier": {"type": "string", "format": "uuid"},
    "mail": matching(r"^[a-z]{1,8}(\.[a-z]{1,8})?@[a-z]{2,8}\.(com|org|net)$"),
}

CHOICES: dict[str, Schema] = {
    "enum of all kinds": {"enum": [1, "two", None, True, 3.5, [4], {"five": 5}]},
    "enum of all languages": {"enum": ["naïve", "日本語", "🙂🙃", "مرحبا", "a\nb", 'q"q']},
    "enum of 200": {"enum": [f"{number * 7919 % 1000:03}-{number}" for number in range(200)]},
    "constant": {"const": {"a": [1, 2.5, None], "b": "ü"}},
    "number or boolean": {"anyOf": [whole(0, 999), BOOLEAN]},
    "nullable": thing(nickname={"anyOf": [NOTHING, SMALL_LETTERS]}),
    "list of types": thing(value={"type": ["integer", "null", "boolean"], "maximum": 999}),
    "one of two": {"oneOf": [whole(0, 9), matching("^[a-z]{3}$")]},
    "all of two": {
        "allOf": [
            {"type": "object", "properties": {"a": whole()}, "required": ["a"]},
            {"properties": {"b": BOOLEAN}, "required": ["b"]},
        ],
        "properties": {"a": {}, "b": {}},
        "additionalProperties": False,
    },
    "all of two bounds": {"allOf": [{"type": "integer", "minimum": 7}, {"maximum": 77}]},
}

REFERENCES: dict[str, Schema] = {
    "one of its own": {
        "$defs": {"money": thing(amount=whole(0, 999), currency={"enum": ["EUR", "USD"]})},
        **thing(price={"$ref": "#/$defs/money"}, tax={"$ref": "#/$defs/money"}),
    },
    "chain": {
        "$defs": {
            "node": thing(value=whole(), next={"anyOf": [NOTHING, {"$ref": "#/$defs/node"}]})
        },
        "$ref": "#/$defs/node",
    },
    "tree": {
        "$defs": {"tree": thing(leaf=BOOLEAN, under=array({"$ref": "#/$defs/tree"}, 0, 2))},
        "$ref": "#/$defs/tree",
    },
    "two that name each other": {
        "$defs": {
            "ping": some(pong={"$ref": "#/$defs/pong"}),
            "pong": some("n", n=whole(0, 9), ping={"$ref": "#/$defs/ping"}),
        },
        "$ref": "#/$defs/ping",
    },
}

USED: dict[str, Schema] = {
    "call of a tool": thing(
        name={"const": "get_weather"},
        arguments=some("city", city=text(2, 14), unit={"enum": ["celsius", "fahrenheit"]}),
    ),
    "one of three tools": {
        "anyOf": [
            thing(tool={"const": "search"}, query=text(1, 20)),
            thing(tool={"const": "open"}, page=whole(1, 50)),
            thing(tool={"const": "stop"}),
        ]
    },
    "request": thing(
        method={"enum": ["GET", "POST", "DELETE"]},
        path=matching(r"^(/[a-z]{1,8}){1,3}$"),
        retries=whole(0, 5),
    ),
    "invoice": thing(
        number=matching(r"^INV-\d{4}$"),
        lines=array(thing(item=text(2, 10), count=whole(1, 9), price=HALVES), 1, 2),
        paid=BOOLEAN,
    ),
    "event in a calendar": some(
        "title",
        "date",
        title=text(3, 20),
        date={"type": "string", "format": "date"},
        guests=array(SMALL_LETTERS, 0, 2),
    ),
    "recipe": thing(
        dish=text(3, 16),
        minutes={"type": "integer", "multipleOf": 5, "minimum": 5, "maximum": 120},
        steps=array(text(5, 24), 1, 2),
    ),
    "point on a map": thing(
        type={"const": "Point"},
        coordinates={
            "type": "array",
            "prefixItems": [whole(-180, 180), whole(-90, 90)],
            "items": False,
            "minItems": 2,
        },
    ),
    "mood of a text": thing(mood={"enum": ["good", "bad", "neutral"]}, certainty=whole(0, 100)),
    "line of a log": thing(level={"enum": ["info", "error"]}, code=whole(100, 599), at=text(4, 16)),
    "move in chess": thing(move=matching("^[NBRQK]?[a-h]?[1-8]?x?[a-h][1-8](=[NBRQ])?[+#]?$")),
}

SCHEMAS: dict[str, Schema] = OBJECTS | ARRAYS | NUMBERS | TEXTS | CHOICES | REFERENCES | USED
