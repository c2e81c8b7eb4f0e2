"""What an answer must match, in the spellings of OpenAI, SGLang and vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import msgspec

from sgl.constrained.grammar import parse_grammar
from sgl.errors import InvalidRequestError
from sgl.protocol.body import one_of
from sgl.sampling_params import WRITTEN_KINDS, Grammar, GrammarKind

MAX_CHOICES = 10_000
FORMATS = ("text", "json_object", "json_schema", "structural_tag")


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """`json_schema` of a response format.

    schema   the whole answer is JSON of it
    name, description, strict   change nothing
    """

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """What the answer must match, as OpenAI has it.

    type         text: no constraint; json_object: any JSON object
    json_schema  with type json_schema
    structures, triggers   with type structural_tag, as in the field of that name
    """

    type: Annotated[str, one_of(*FORMATS)]
    json_schema: JsonSchemaFormat | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer must match, as vLLM has it: one of these.

    json            a JSON schema, as an object or as text
    regex           the whole answer matches it
    choice          the answer is one of these texts
    grammar         as ebnf
    json_object     any JSON object
    structural_tag  as structural_tag, as text
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None


class GrammarBody(msgspec.Struct, kw_only=True):
    """The fields of both `/v1` endpoints that may hold a grammar; null means not given.

    response_format     what the answer must match, as OpenAI has it; one request has one grammar
    regex               the whole answer matches it, as re.fullmatch would; \\d is an ASCII digit
    json_schema         the answer is JSON of this schema, which is an object or text;
                        "$$ANY$$": any JSON
    ebnf                a grammar in GBNF with the start rule root, or in Lark
    structural_tag      {"structures": [{"begin", "schema", "end"}], "triggers": [...]}, also as
                        text: free text, but after a trigger a structure must follow
    structured_outputs  what the answer must match, as vLLM has it
    guided_json, guided_regex, guided_choice, guided_grammar   vLLM's older names for
                        fields of structured_outputs
    """

    response_format: ResponseFormat | None = None
    regex: str | None = None
    json_schema: str | dict[str, Any] | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class _Wish(NamedTuple):
    """One grammar of a request, and the field it stands in."""

    param: str
    kind: GrammarKind
    source: str | dict[str, Any]


ANY_OBJECT = {"type": "object"}


def grammar_of(body: GrammarBody) -> Grammar | None:
    """Raises InvalidRequestError for several, or for one that cannot be a grammar."""
    wishes = list(_wishes(body))
    if not wishes:
        return None
    if len(wishes) > 1:
        raise InvalidRequestError(
            f"{wishes[0].param} and {wishes[1].param} both say what the answer must match: "
            "give one of them",
            param=wishes[1].param,
        )
    try:
        return parse_grammar(wishes[0].kind, wishes[0].source)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), param=wishes[0].param) from None


def _wishes(body: GrammarBody) -> Iterator[_Wish]:
    if body.response_format is not None:
        yield from _of_format(body.response_format)
    for kind in WRITTEN_KINDS:
        if (source := getattr(body, kind)) is not None:
            yield _Wish(kind, kind, source)
    guided = StructuredOutputs(
        json=body.guided_json,
        regex=body.guided_regex,
        choice=body.guided_choice,
        grammar=body.guided_grammar,
    )
    yield from _of_vllm("guided_", guided)
    if body.structured_outputs is not None:
        if body.structured_outputs == StructuredOutputs():
            raise InvalidRequestError(
                "structured_outputs says nothing of the answer: it has one of "
                f"{', '.join(StructuredOutputs.__struct_fields__)}",
                param="structured_outputs",
            )
        yield from _of_vllm("structured_outputs.", body.structured_outputs)


def _of_format(wanted: ResponseFormat) -> Iterator[_Wish]:
    param = "response_format"
    match wanted.type:
        case "text":
            pass
        case "json_object":
            yield _Wish(param, GrammarKind.JSON_SCHEMA, ANY_OBJECT)
        case "json_schema":
            if wanted.json_schema is None:
                raise InvalidRequestError(f"{param} has no json_schema", param=param)
            yield _Wish(param, GrammarKind.JSON_SCHEMA, wanted.json_schema.schema)
        case "structural_tag":
            tag = {"structures": wanted.structures or [], "triggers": wanted.triggers or []}
            yield _Wish(param, GrammarKind.STRUCTURAL_TAG, tag)
        case _:
            raise InvalidRequestError(
                f"{param} {wanted.type!r:.40} is not known: its type is one of "
                f"{', '.join(FORMATS)}",
                param=param,
            )


def _of_vllm(prefix: str, wanted: StructuredOutputs) -> Iterator[_Wish]:
    if wanted.json is not None:
        yield _Wish(f"{prefix}json", GrammarKind.JSON_SCHEMA, wanted.json)
    if wanted.json_object:
        yield _Wish(f"{prefix}json_object", GrammarKind.JSON_SCHEMA, ANY_OBJECT)
    if wanted.regex is not None:
        yield _Wish(f"{prefix}regex", GrammarKind.REGEX, wanted.regex)
    if wanted.grammar is not None:
        yield _Wish(f"{prefix}grammar", GrammarKind.EBNF, wanted.grammar)
    if wanted.structural_tag is not None:
        yield _Wish(f"{prefix}structural_tag", GrammarKind.STRUCTURAL_TAG, wanted.structural_tag)
    if wanted.choice is not None:
        yield _Wish(f"{prefix}choice", GrammarKind.REGEX, _any_of(wanted.choice, prefix))


def _any_of(choices: list[str], prefix: str) -> str:
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequestError(
            f"{prefix}choice must have 1 to {MAX_CHOICES} texts, got {len(choices)}",
            param=f"{prefix}choice",
        )
    return "|".join(map(re.escape, choices))
