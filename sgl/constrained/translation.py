"""Grammars as clients write them, in the language of llguidance.

regex         wrapped, with what Python and Rust read differently rewritten
json_schema   with the space that answers may have
ebnf          GBNF is turned into Lark, which llguidance reads
structures    free text and triggers, as Lark
parts         grammars that stand in the rules of another, under a name
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
from llguidance import LLMatcher, StructTag
from llguidance.gbnf_to_lark import gbnf_to_lark

from sgl.constrained.grammar import refused
from sgl.constrained.regex import as_rust_reads_it
from sgl.sampling_params import Grammar, GrammarKind

MAX_DEPTH = 64  # of a schema: what reads it recurses
MAX_TRIGGERS = 1000
OPTIONS = "x-guidance"  # a schema's own, for llguidance
CLIENT_OPTIONS = frozenset({"coerce_one_of"})


def translate(grammar: Grammar, json_space: str) -> str:
    """Raises InvalidRequestError for what cannot be said in llguidance's language.

    json_space  regular expression of what may stand wherever JSON allows space
    """
    if grammar.part is None:
        return _TRANSLATORS[grammar.kind](grammar.text, json_space)
    inner, *others = _grammars(translate(grammar.part, json_space))
    inner["name"] = grammar.part_name
    return json.dumps({"grammars": [{"lark_grammar": grammar.text}, inner, *others]})


def _grammars(text: str) -> list[dict[str, Any]]:
    """What llguidance reads is a list of grammars, or one in Lark by itself."""
    if not text.startswith("{"):
        return [{"lark_grammar": text}]
    grammars: list[dict[str, Any]] = json.loads(text)["grammars"]
    return grammars


def _from_rules(text: str, _: str) -> str:
    return text


def _from_regex(text: str, _: str) -> str:
    return LLMatcher.grammar_from_regex(as_rust_reads_it(text))


def _from_json_schema(text: str, json_space: str) -> str:
    schema = json.loads(text)
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    try:
        return LLMatcher.grammar_from_json_schema(
            json.dumps(_with_space(schema, json_space, GrammarKind.JSON_SCHEMA))
        )
    except ValueError as error:
        raise refused(GrammarKind.JSON_SCHEMA, str(error)) from None


def _from_ebnf(text: str, _: str) -> str:
    """GBNF; without a `::=` it is taken for Lark, which vLLM's clients send in the same field."""
    if "::=" not in text:
        return LLMatcher.grammar_from_lark(text)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(text))
    except RecursionError:
        raise refused(GrammarKind.EBNF, "it is nested too deeply") from None
    except Exception as error:  # the library's own are bare ones
        raise refused(GrammarKind.EBNF, str(error)) from None


class _Structure(msgspec.Struct):
    begin: str
    end: str
    schema: dict[str, Any]


class _StructuralTag(msgspec.Struct):
    structures: list[_Structure]
    triggers: list[str]


def _from_structural_tag(text: str, json_space: str) -> str:
    kind = GrammarKind.STRUCTURAL_TAG
    try:
        wanted = msgspec.json.decode(text, type=_StructuralTag)
    except msgspec.ValidationError as error:
        raise refused(kind, str(error)) from None
    if not wanted.structures:
        raise refused(kind, "structures is empty")
    for name in ("structures", "triggers"):
        if (num := len(getattr(wanted, name))) > MAX_TRIGGERS:
            raise refused(kind, f"it has {num} {name}, at most {MAX_TRIGGERS} are read")
    tags = [
        StructTag(
            trigger=_trigger_of(structure, wanted.triggers),
            begin=structure.begin,
            grammar=_with_space(structure.schema, json_space, kind),
            end=structure.end,
        )
        for structure in wanted.structures
    ]
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))


def _trigger_of(structure: _Structure, triggers: list[str]) -> str:
    for trigger in triggers:
        if trigger and structure.begin.startswith(trigger):
            return trigger
    raise refused(
        GrammarKind.STRUCTURAL_TAG, f"no trigger is the beginning of {structure.begin!r:.80}"
    )


_TRANSLATORS: dict[GrammarKind, Callable[[str, str], str]] = {
    GrammarKind.REGEX: _from_regex,
    GrammarKind.JSON_SCHEMA: _from_json_schema,
    GrammarKind.EBNF: _from_ebnf,
    GrammarKind.STRUCTURAL_TAG: _from_structural_tag,
    GrammarKind.TOOLS: _from_rules,
}


def _with_space(schema: dict[str, Any], json_space: str, kind: GrammarKind) -> dict[str, Any]:
    """The operator's space goes into the schema; what its author says of space is refused."""
    _check_depth(schema, kind)
    options = schema.get(OPTIONS, {})
    if not isinstance(options, dict) or not options.keys() <= CLIENT_OPTIONS:
        raise refused(
            kind,
            f"{OPTIONS} may hold {', '.join(sorted(CLIENT_OPTIONS))} and nothing else: which space "
            "an answer may have is for the server to say (--constrained-json-whitespace-pattern)",
        )
    return schema | {OPTIONS: options | {"whitespace_pattern": json_space}}


def _check_depth(schema: Any, kind: GrammarKind) -> None:
    level = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise refused(kind, f"it is nested deeper than {MAX_DEPTH} levels")
