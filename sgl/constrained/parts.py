"""Grammars made of parts, in llguidance's dialect of Lark.

a marker   one token where the vocabulary has it, spelled out otherwise
@answer    a grammar that was made for a whole answer, as a part of a larger one
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from sgl.constrained.grammar import MAX_CHARS
from sgl.errors import InvalidRequestError
from sgl.sampling_params import Grammar, GrammarKind

ONE_SPACE = {"whitespace_pattern": "[ ]?"}
TEXT = r"/(.|\n)*/"  # without special tokens: those are never text
ANSWER = "@answer"
SAID = "@said"  # after thoughts; @answer may be a part of it


class Marker(NamedTuple):
    """A text that a model writes around a part of its answer, and the token that stands for it."""

    text: str
    token_id: int | None = None

    @property
    def rule(self) -> str:
        spelled = literal(self.text)
        return spelled if self.token_id is None else f"(<[{self.token_id}]> | {spelled})"


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': ONE_SPACE})}"


def text_until(name: str, marker: Marker) -> str:
    """Rules: `name` is any text up to and with the first `marker`."""
    spelled = f"{name}_spelled[lazy]: {TEXT} {literal(marker.text)}\n"
    if marker.token_id is None:
        return f"{name}: {name}_spelled\n{spelled}"
    return f"{name}: {name}_text <[{marker.token_id}]> | {name}_spelled\n{spelled}" + (
        f"{name}_text: {TEXT}\n"
    )


def composed(
    kind: GrammarKind, rules: str, answer: Grammar | None = None, name: str = ANSWER
) -> Grammar:
    """The grammar with these Lark rules, in which `name` stands for `answer`.

    Raises InvalidRequestError if it gets too long.
    """
    if len(rules) > MAX_CHARS:
        raise InvalidRequestError(
            f"{kind} make a grammar of {len(rules)} characters, at most {MAX_CHARS} are read",
            param=kind,
        )
    return Grammar(kind, rules, answer, name.removeprefix("@"))


def after_thoughts(
    answer: Grammar, opening: Marker, closing: Marker, *, are_optional: bool
) -> Grammar:
    """`answer`, but what is thought before it is free."""
    thoughts = f"{opening.rule} thoughts" if are_optional else f"{opening.rule}? thoughts"
    start = f"({thoughts} space)? {SAID}" if are_optional else f"{thoughts} space {SAID}"
    rules = f"start: {start}\n{text_until('thoughts', closing)}space: /[ \\n]{{0,8}}/\n"
    return composed(answer.kind, rules, answer, SAID)
