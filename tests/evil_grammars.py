"""Grammars made to break the server: each is answered with a valid beginning, or refused.

for name, kind, source in evil_grammars(): ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sgl.sampling_params import GrammarKind

REGEX, JSON_SCHEMA = GrammarKind.REGEX, GrammarKind.JSON_SCHEMA
EBNF, STRUCTURAL_TAG = GrammarKind.EBNF, GrammarKind.STRUCTURAL_TAG
MILLION = 1_000_000

Schema = dict[str, Any]


class EvilGrammar(NamedTuple):
    name: str
    kind: GrammarKind
    source: str | Schema


def evil_grammars() -> Iterator[EvilGrammar]:
    for kind, sources in (
        (REGEX, _regexes()),
        (JSON_SCHEMA, _schemas()),
        (JSON_SCHEMA, _products()),
        (JSON_SCHEMA, _loops()),
        (EBNF, _gbnf()),
        (EBNF, _lark()),
        (STRUCTURAL_TAG, _tags()),
    ):
        for name, source in sources:
            yield EvilGrammar(f"{kind}: {name}", kind, source)


def _regexes() -> Iterator[tuple[str, str]]:
    yield "open brackets", "(" * 5000
    yield "deep stars", "(" * 200 + "a" + "*)" * 200
    yield "long counter", r"\w{1,100000}"
    yield "one or two of a letter", "((a|aa)+)+b"
    yield "nested counters", "((a{1,100}){1,100}){1,100}"
    yield "nested counters of words", r"((\w{1,100} ){1,100}\d){1,100}"
    yield "letter far from the end", "(a|b)*a(a|b){300}"
    yield "words far from the end", r"(.*\w.{60}[aeiou].{60}){30}"
    yield "words in any order", "|".join(f"word{number:x}" for number in range(60_000))
    yield "all of Unicode", r"([\p{L}\p{M}]{1,50}[\p{N}\p{P}]{1,50}[^\p{Lu}]){1,50}"
    yield "million letters", "x" * MILLION
    yield "million letters and one", "x" * (MILLION + 1)
    yield "million of classes", "[a-z]" * (MILLION // 5)
    yield "digits without end", r"\d" * (MILLION // 2)
    yield "hundred million letters", "a{100000000}"
    yield "hundred million letters after a choice", "[ab]a{100000000}"
    yield "counters without a common part", "[ab](a{7919}){1000}(a{104729})+"
    yield "backwards", "[z-a]{2,1}"


def _schemas() -> Iterator[tuple[str, str | Schema]]:
    yield "enum of 20,000", {"enum": [f"value {number}" for number in range(20_000)]}
    yield "1,000 levels", _nested(500)
    yield "open braces", '{"a":' * 100_000
    yield "million letters", {"type": "object", "description": "x" * (MILLION - 100)}
    yield "const of a million letters", {"const": "x" * (MILLION - 100)}
    texts = {f"property {number}": {"type": "string"} for number in range(10_000)}
    yield "10,000 optional properties", {"properties": texts, "additionalProperties": False}
    some = {f"p{number}": {"pattern": f"^[a-z]{{{number % 9}}}$"} for number in range(1000)}
    yield "1,000 required", {"type": "object", "properties": some, "required": [*some]}
    yield "100,000 items", {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}
    yield "endless text", {"type": "string", "minLength": 100_000, "maxLength": 10**9}
    yield "a number of 400 digits", {"type": "integer", "minimum": 10**400}
    yield "tiny multiple", {"type": "number", "multipleOf": 1e-12, "minimum": 1, "maximum": 1e300}
    yield "not a number", '{"type": "number", "minimum": NaN}'
    yield "half a letter", '{"enum": ["\\ud800"]}'
    dates = {f"d{number}": {"format": "date-time"} for number in range(300)}
    yield "dates", {"type": "object", "properties": dates, "required": [*dates]}
    yield (
        "its own limits",
        {
            "type": "object",
            "x-guidance": {"whitespace_pattern": r"(\s|.){0,100000}", "lenient": True},
        },
    )


def _products() -> Iterator[tuple[str, Schema]]:
    """Small schemas of which every combination is one more."""
    yield (
        "allOf of anyOf",
        {
            "allOf": [
                {"anyOf": [{"required": [f"p{one}{other}"]} for other in range(8)]}
                for one in range(20)
            ],
            "type": "object",
        },
    )
    yield (
        "allOf of oneOf",
        {
            "allOf": [
                {"oneOf": [{"multipleOf": one + other} for other in range(2, 12)]}
                for one in range(20)
            ]
        },
    )
    yield (
        "patterns of one text",
        {
            "allOf": [
                {"type": "string", "pattern": f"(a|b){{{number}}}a.*b"} for number in range(60)
            ]
        },
    )
    yield "pattern that explodes", {"type": "string", "pattern": "^(a|b)*a(a|b){400}$"}
    yield (
        "oneOf of 2,000",
        {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"a": {"type": "integer"}, f"b{number}": {"const": 1}},
                }
                for number in range(2000)
            ]
        },
    )
    yield (
        "anyOf of texts",
        {"anyOf": [{"type": "string", "pattern": f"^.*{number}.*$"} for number in range(3000)]},
    )


def _loops() -> Iterator[tuple[str, Schema]]:
    yield "itself", {"$ref": "#"}
    yield "all of itself", {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}
    yield "one of itself", {"oneOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}]}
    both = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
    yield "each other", {"$defs": both, "$ref": "#/$defs/a"}
    chain: Schema = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(10_000)}
    yield "10,000 links", {"$defs": chain | {"d10000": {"type": "null"}}, "$ref": "#/$defs/d0"}
    doubled: Schema = {
        f"d{number}": {"allOf": [{"$ref": f"#/$defs/d{number + 1}"}] * 2} for number in range(40)
    }
    yield "doubled 40 times", {"$defs": doubled | {"d40": {}}, "$ref": "#/$defs/d0"}
    tree = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "minItems": 9}
    yield "endless tree", {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}


def _gbnf() -> Iterator[tuple[str, str]]:
    yield "left recursion", 'root ::= root "a" | "a"'
    yield "loop of nothing", 'root ::= (""*)* root?'
    yield "any tree", 'root ::= root root root | root root | "a" | ""'
    yield "30,000 rules", _rules(30_000, lambda number: f'"a" r{number + 1} | "b"')
    yield "30,000 names of one text", _rules(30_000, lambda number: f"r{number + 1}")
    yield "open brackets", "root ::= " + "(" * 100_000
    yield "deep brackets", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000
    yield "no beginning", 'leaf ::= "a"'
    yield "one name twice", 'root ::= fooBar foo-bar\nfooBar ::= "a" root\nfoo-bar ::= "b" root'
    yield "nested counters", 'root ::= (("a" | root){1,1000}){1,1000}'
    yield "count of 5,000 digits", f'root ::= "a"{{{"9" * 5000}}}'
    yield "million letters", f'root ::= "{"x" * (MILLION - 100)}"'
    yield "brackets that nest", 'root ::= ("(" root ")" | "[" root "]")* "x"'


def _lark() -> Iterator[tuple[str, str]]:
    yield "Lark, open brackets", "start: " + "(" * 100_000
    yield "Lark, deep brackets", "start: " + "(" * 100_000 + '"a"' + ")" * 100_000
    yield "Lark, any tree", 'start: start start | start start start | "a" | '
    yield "Lark, both of two", "start: A\nA: /(a|b)*a(a|b){300}/ & /(a|b)*b(a|b){299}/"
    yield "Lark, not", "start: A\nA: ~/(.|\\n)*a(.|\\n){300}/"
    yield "Lark, schema", f"start: %json {_nested(500)}"
    yield "Lark, rules that hide", _lark_chain(40)
    yield "Lark, counters", "start: a{0,100000}\na: b{0,100000}\nb: /[a-z]+/ | start"
    yield "Lark, for ever", 'start: A start\nA: "a"'
    yield "Lark, tokens that hide", _lark_chain(40).replace("r", "R").replace("staRt", "start")
    yield "Lark, file", 'start: A\n%import /etc/passwd\nA: "a"'


def _tags() -> Iterator[tuple[str, str | Schema]]:
    yield "5,000 triggers", _tag([f"<call{number}>" for number in range(5000)])
    yield "5,000 beginnings of one trigger", _tag([f"<{number}>" for number in range(5000)], ["<"])
    yield "beginnings of each other", _tag(["<" + "a" * number for number in range(1, 300)])
    yield "empty trigger", _tag(["<a>"], [""])
    yield "no trigger", _tag(["<a>"], ["<b>"])
    yield "10,000 triggers of one", _tag(["<a>"], [f"<b{number}>" for number in range(10_000)])
    yield "million letters", _tag(["<" + "a" * (MILLION - 1000)], ["<"])
    yield "1,000 levels", json.dumps(_tag(["<a>"])).replace("{}", _nested(500))
    yield "quotes and lines", _tag(['<"\n\\/>'], ['<"'])


def _nested(depth: int) -> str:
    """A schema; each object in it has a property that is one."""
    return '{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth


def _rules(count: int, body: Callable[[int], str]) -> str:
    """A chain: each rule is made by `body` from its number, and names the next."""
    rules = [f"r{number} ::= {body(number)}" for number in range(count)]
    return "\n".join(["root ::= r0", *rules, f'r{count} ::= "c"'])


def _lark_chain(count: int) -> str:
    """Each rule is twice the next: 2^count letters."""
    rules = [f"r{number}: r{number + 1} r{number + 1}" for number in range(count)]
    return "\n".join(["start: r0", *rules, f'r{count}: "a" | ""'])


def _tag(begins: list[str], triggers: list[str] | None = None) -> Schema:
    structures = [{"begin": begin, "end": ">", "schema": {}} for begin in begins]
    return {"structures": structures, "triggers": begins if triggers is None else triggers}
