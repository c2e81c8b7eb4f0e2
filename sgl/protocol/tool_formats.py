"""The ways in which models write calls: how to tell which one a model has, and how to read it."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

from sgl.protocol.answer_parts import TextParser
from sgl.protocol.json_calls import JsonCallParser, JsonSyntax
from sgl.protocol.pythonic_calls import PythonicCallParser

_ID_LETTERS = string.ascii_letters + string.digits


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Mistral's templates take ids of nine letters only."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


class ToolFormat(NamedTuple):
    """
    markers      what stands around calls; special tokens among them stay in the text
    traces       texts in a chat template that give the format away
    not_traces   texts in a chat template of a similar format that is another one
    new_id       the id of a call
    make_parser  from the names of functions, and how many characters to hold back
    """

    name: str
    markers: tuple[str, ...]
    traces: tuple[str, ...]
    not_traces: tuple[str, ...]
    new_id: Callable[[], str]
    make_parser: Callable[[Collection[str], int], TextParser]


HERMES = JsonSyntax("<tool_call>", closing="</tool_call>")
MISTRAL = JsonSyntax("[TOOL_CALLS]", bracket="[", separator=",", closing="]")
LLAMA3 = JsonSyntax("<|python_tag|>", separator=";", is_bare=True)

_LLAMA3_HINT = '{"name": function name, "parameters": dictionary of argument name and its value}'

TOOL_FORMATS = {
    each.name: each
    for each in (
        ToolFormat(
            "hermes",
            (HERMES.opening, HERMES.closing),
            (HERMES.opening,),
            ("<function=", "<arg_key>"),
            _call_id,
            partial(JsonCallParser, HERMES),
        ),
        ToolFormat(
            "mistral",
            (MISTRAL.opening,),
            (MISTRAL.opening,),
            ("[ARGS]", "[CALL_ID]"),
            _short_id,
            partial(JsonCallParser, MISTRAL),
        ),
        ToolFormat(
            "llama3",
            (LLAMA3.opening,),
            (LLAMA3.opening, _LLAMA3_HINT),
            (),
            _call_id,
            partial(JsonCallParser, LLAMA3),
        ),
        ToolFormat(
            "pythonic", (), (), (), _call_id, lambda names, hold_chars: PythonicCallParser(names)
        ),
    )
}
PLAIN = TOOL_FORMATS["llama3"]  # a call is a JSON object: what any model can be held to


def find_format(template: str, has_token: Callable[[str], bool]) -> ToolFormat | None:
    """The format that a chat template tells of; where it only shows tools, the vocabulary may."""
    for each in TOOL_FORMATS.values():
        if any(trace in template for trace in each.traces):
            return None if any(trace in template for trace in each.not_traces) else each
    if "tools" not in template:
        return None
    return next((each for each in TOOL_FORMATS.values() if _has_all(each, has_token)), None)


def _has_all(form: ToolFormat, has_token: Callable[[str], bool]) -> bool:
    return bool(form.markers) and all(map(has_token, form.markers))
