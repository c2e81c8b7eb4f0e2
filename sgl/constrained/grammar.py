"""What an answer must match, as clients write it, in the language of llguidance.

regex, json_schema, ebnf, structural tags ──▶ Grammar ──▶ one text that llguidance compiles
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher, StructTag
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from sgl.constrained.regex import as_rust_reads_it
from sgl.errors import InvalidRequestError
from sgl.sampling_params import WRITTEN_KINDS, Grammar, GrammarKind

ANY_JSON = "$$ANY$$"  # as a schema: any JSON value
MAX_CHARS = 1_000_000
MAX_DEPTH = 64  # of a schema: what reads it recurses


def parse_grammar(kind: GrammarKind, source: str | dict[str, Any]) -> Grammar:
    """Raises InvalidRequestError for what cannot be a grammar; compiling it may find more."""
    if isinstance(source, str) and len(source) > MAX_CHARS:
        raise InvalidRequestError(
            f"{kind} has {len(source)} characters, at most {MAX_CHARS} are read", param=kind
        )
    return Grammar(kind, _PARSERS[kind](source), is_schema=kind is GrammarKind.JSON_SCHEMA)


def one_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """The one grammar among a request's fields; raises InvalidRequestError if there are several."""
    given = [kind for kind in WRITTEN_KINDS if fields.get(kind) is not None]
    if len(given) > 1:
        names = ", ".join(WRITTEN_KINDS)
        raise InvalidRequestError(f"only one of {names} can be set", param=given[1])
    return parse_grammar(given[0], fields[given[0]]) if given else None


def _from_regex(source: str | dict[str, Any]) -> str:
    return LLMatcher.grammar_from_regex(as_rust_reads_it(_text(GrammarKind.REGEX, source)))


def _from_json_schema(source: str | dict[str, Any]) -> str:
    schema = {} if source == ANY_JSON else _json(GrammarKind.JSON_SCHEMA, source)
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    _check_depth(schema)
    return json.dumps(schema)


def _from_ebnf(source: str | dict[str, Any]) -> str:
    """GBNF; without a `::=` it is taken for Lark, which vLLM's clients send in the same field."""
    text = _text(GrammarKind.EBNF, source)
    if "::=" not in text:
        return LLMatcher.grammar_from_lark(text)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(text))
    except GbnfToLarkError as error:
        raise InvalidRequestError(f"ebnf: {error}", param=GrammarKind.EBNF) from None


class _Structure(msgspec.Struct):
    begin: str
    end: str
    schema: dict[str, Any]


class _StructuralTag(msgspec.Struct):
    structures: list[_Structure]
    triggers: list[str]


def _from_structural_tag(source: str | dict[str, Any]) -> str:
    try:
        wanted = msgspec.convert(_json(GrammarKind.STRUCTURAL_TAG, source), _StructuralTag)
    except msgspec.ValidationError as error:
        raise _refused(GrammarKind.STRUCTURAL_TAG, str(error)) from None
    tags = []
    for structure in wanted.structures:
        trigger = next(filter(structure.begin.startswith, filter(None, wanted.triggers)), None)
        if trigger is None:
            raise _refused(
                GrammarKind.STRUCTURAL_TAG, f"no trigger is the beginning of {structure.begin!r}"
            )
        _check_depth(structure.schema)
        tags.append(
            StructTag(
                trigger=trigger,
                begin=structure.begin,
                grammar=structure.schema,
                end=structure.end,
            )
        )
    if not tags:
        raise _refused(GrammarKind.STRUCTURAL_TAG, "structures is empty")
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))


_PARSERS: dict[GrammarKind, Callable[[str | dict[str, Any]], str]] = {
    GrammarKind.REGEX: _from_regex,
    GrammarKind.JSON_SCHEMA: _from_json_schema,
    GrammarKind.EBNF: _from_ebnf,
    GrammarKind.STRUCTURAL_TAG: _from_structural_tag,
}


def _text(kind: GrammarKind, source: str | dict[str, Any]) -> str:
    if not isinstance(source, str):
        raise _refused(kind, "it must be a string")
    return source


def _json(kind: GrammarKind, source: str | dict[str, Any]) -> Any:
    if isinstance(source, dict):
        return source
    if not isinstance(source, str):
        raise _refused(kind, "it must be a JSON object or the text of one")
    try:
        found = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise _refused(kind, f"it is not valid JSON: {error}") from None
    if not isinstance(found, dict | bool):
        raise _refused(kind, "it must be a JSON object")
    return found


def _check_depth(schema: Any) -> None:
    level = [schema]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            inner += (
                item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
            )
        level = inner
        if not level:
            return
    raise _refused(GrammarKind.JSON_SCHEMA, f"it is nested deeper than {MAX_DEPTH} levels")


def _refused(kind: GrammarKind, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{kind}: {why}", param=kind)
