"""Grammars of calls, in the format in which the model writes them.

required           calls, and nothing else
auto and strict    any text, and calls at its end, whose arguments match their schemas
auto, and a grammar of the answer   either of the two
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any, NamedTuple

from sgl.constrained.parts import ANSWER, TEXT, Marker, composed, json_rule, literal, text_until
from sgl.errors import InvalidRequestError
from sgl.protocol.tool_formats import HERMES, LLAMA3, MISTRAL
from sgl.protocol.tools import Tool, ToolUse
from sgl.sampling_params import Grammar, GrammarKind

Schema = dict[str, Any]

# what may let in arguments that `properties` does not list
_OPEN_KEYS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "if"}
_OPEN_KEYS |= {"$ref", "allOf", "anyOf", "oneOf"}
_DEFINITIONS = ("$defs", "definitions")
_PYTHONIC_KEYS = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS}
_PYTHONIC_KEYS |= {"title", "description", "$schema"}


class _Shape(NamedTuple):
    """What stands around calls: pieces of Lark rules.

    opening   tells calls from text; None where the first character does
    free      text that is no call, where nothing opens one
    """

    opening: Marker | None
    before: str
    after_each: str
    between: str
    after: str
    free: str = ""

    def calls(self, max_calls: int | None) -> str:
        one = f"call {self.after_each}"
        others = "" if max_calls == 1 else f"({self.between} {one})*"
        return f"{self.before} {one} {others} {self.after}"


def tools_grammar(
    use: ToolUse, form: str, markers: Mapping[str, Marker], answer: Grammar | None
) -> Grammar | None:
    """What holds an answer to `use`; None where nothing does.

    answer   what the answer must match if there are no calls

    Raises InvalidRequestError for parameters that the format cannot be held to.
    """
    if use.choice == "auto" and answer is None and not use.is_strict:
        return None
    shape = _shape(form, markers)
    if shape.opening is None and _is_json(answer):
        raise InvalidRequestError(
            "calls of this model begin as JSON does, so an answer cannot be either a call or JSON: "
            "leave out response_format, or set tool_choice to required or none",
            param="response_format",
        )
    schemas = [_schema(tool, is_exact=_is_exact(tool, use)) for tool in use.callable]
    rules = (
        _start(shape, use, has_answer=answer is not None)
        + f"calls: {shape.calls(use.max_calls)}\n"
        + f"call: {' | '.join(f'call_{number}' for number in range(len(schemas)))}\n"
        + "".join(
            _call_rules(form, number, tool.function.name, schema)
            for number, (tool, schema) in enumerate(zip(use.callable, schemas, strict=True))
        )
    )
    return composed(GrammarKind.TOOLS, rules, answer)


def _is_json(answer: Grammar | None) -> bool:
    return answer is not None and answer.kind is GrammarKind.JSON_SCHEMA


def _is_exact(tool: Tool, use: ToolUse) -> bool:
    return use.choice == "required" or bool(tool.function.strict)


def _shape(form: str, markers: Mapping[str, Marker]) -> _Shape:
    match form:
        case "hermes":
            opening, closing = markers[HERMES.opening], markers[HERMES.closing].rule
            return _Shape(opening, r'"\n"', rf'"\n" {closing}', rf'"\n" {opening.rule} "\n"', "")
        case "mistral":
            return _Shape(markers[MISTRAL.opening], '" "? "["', "", '", "', '"]"')
        case "llama3":
            tag = markers[LLAMA3.opening].token_id
            before = "" if tag is None else f"<[{tag}]>?"
            return _Shape(None, before, "", '"; "', "", r"/([^{\s](.|\n)*)?/")
        case _:
            return _Shape(None, '"["', "", '", "', '"]"', r"/([^\[\s](.|\n)*)?/")


def _start(shape: _Shape, use: ToolUse, *, has_answer: bool) -> str:
    opening = shape.opening
    calls = "calls" if opening is None else f"{opening.rule} calls"
    if use.choice == "required":
        return f"start: {calls}\n"
    if has_answer:
        return f"start: {calls} | {ANSWER}\n"
    if opening is None:
        return f"start: calls | FREE\nFREE: {shape.free}\n"
    return f"start: FREE | lead calls\nFREE: {TEXT}\n{text_until('lead', opening)}"


def _schema(tool: Tool, *, is_exact: bool) -> Schema:
    """Of the arguments. What `properties` does not list is not made up, unless the schema asks."""
    if not is_exact:
        return {"type": "object"}
    schema = {"type": "object", **(tool.function.parameters or {})}
    if _OPEN_KEYS.isdisjoint(schema):
        schema = {"properties": {}, **schema, "additionalProperties": False}
    return schema


def _call_rules(form: str, number: int, name: str, schema: Schema) -> str:
    if form == "pythonic":
        return _pythonic_rules(number, name, schema)
    key = "parameters" if form == "llama3" else "arguments"
    head = literal(f'{{"name": "{name}", "{key}": ')
    return (
        f'call_{number}: {head} arguments_{number} "}}"\narguments_{number}: {json_rule(schema)}\n'
    )


def _pythonic_rules(number: int, name: str, schema: Schema) -> str:
    """`f(a=1, b=2)`: required arguments first, then any others, in the schema's order."""
    properties = _named_properties(name, schema)
    required = [key for key in properties if key in schema.get("required", [])]
    optional = [key for key in properties if key not in required]
    rules = "".join(
        f"{_value(number, place)}: {literal(key + '=')} {json_rule(properties[key])}\n"
        for place, key in enumerate([*required, *optional])
    )
    values = [_value(number, place) for place in range(len(properties))]
    fixed, rest = values[: len(required)], values[len(required) :]
    tails = [f'(", " {value})?' for value in rest]
    if fixed:
        ways = [' ", " '.join(fixed) + " " + " ".join(tails)]
    else:
        ways = ['""', *(" ".join([value, *tails[at + 1 :]]) for at, value in enumerate(rest))]
    arguments = " | ".join(ways)
    return f'{rules}call_{number}: {literal(name + "(")} ({arguments}) ")"\n'


def _value(number: int, place: int) -> str:
    return f"value_{number}_{place}"


def _named_properties(name: str, schema: Schema) -> dict[str, Schema]:
    """The schema of each argument by itself; raises InvalidRequestError where that is not all."""
    for key in schema:
        if key not in _PYTHONIC_KEYS:
            raise _refused(name, f"has {key!r:.40}")
    if schema.get("additionalProperties", False) is not False:
        raise _refused(name, "has additionalProperties")
    found: dict[str, Schema] = {}
    shared = {key: schema[key] for key in _DEFINITIONS if key in schema}
    properties = {key: {} for key in schema.get("required", [])} | schema.get("properties", {})
    for key, value in properties.items():
        if not key.isidentifier() or keyword.iskeyword(key):
            raise _refused(name, f"has an argument {key!r:.40}, which is no name in Python")
        found[key] = {**(value if isinstance(value, dict) else {}), **shared}
    return found


def _refused(name: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the function {name} {why}: calls as Python writes them can be held to properties and "
        "required only. Leave strict out with tool_choice auto, or change the parameters",
        param="tools",
    )
