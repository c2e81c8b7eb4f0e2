"""What an answer must match, as clients write it.

regex, json_schema, ebnf, structural tags ──▶ Grammar, which translation.py goes on with

This runs where every stream waits for it, so it looks at no more than takes a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from sgl.errors import InvalidRequestError
from sgl.sampling_params import WRITTEN_KINDS, Grammar, GrammarKind

ANY_JSON = "$$ANY$$"  # as a schema: any JSON value
MAX_CHARS = 1_000_000
_IN_JSON = (GrammarKind.JSON_SCHEMA, GrammarKind.STRUCTURAL_TAG)


def parse_grammar(kind: GrammarKind, source: str | dict[str, Any]) -> Grammar:
    """Raises InvalidRequestError for what cannot be a grammar; compiling it may find more."""
    if isinstance(source, str):
        _check_length(kind, source)
    text = _json(kind, source) if kind in _IN_JSON else _text(kind, source)
    _check_length(kind, text)
    return Grammar(kind, text)


def one_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """The one grammar among a request's fields; raises InvalidRequestError if there are several."""
    given = [kind for kind in WRITTEN_KINDS if fields.get(kind) is not None]
    if len(given) > 1:
        names = ", ".join(WRITTEN_KINDS)
        raise InvalidRequestError(f"only one of {names} can be set", param=given[1])
    return parse_grammar(given[0], fields[given[0]]) if given else None


def refused(kind: GrammarKind, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{kind}: {why}", param=kind)


def _check_length(kind: GrammarKind, text: str) -> None:
    if len(text) > MAX_CHARS:
        raise InvalidRequestError(
            f"{kind} has {len(text)} characters, at most {MAX_CHARS} are read", param=kind
        )


def _text(kind: GrammarKind, source: str | dict[str, Any]) -> str:
    if not isinstance(source, str):
        raise refused(kind, "it must be a string")
    return source


def _json(kind: GrammarKind, source: str | dict[str, Any]) -> str:
    """In the shortest form: an object and its text are one grammar."""
    if source == ANY_JSON and kind == GrammarKind.JSON_SCHEMA:
        source = {}
    if not isinstance(source, str | dict):
        raise refused(kind, "it must be a JSON object or the text of one")
    try:
        found = msgspec.json.decode(source) if isinstance(source, str) else source
        if not isinstance(found, dict | bool):
            raise refused(kind, "it must be a JSON object")
        return msgspec.json.encode(found).decode()
    except RecursionError:
        raise refused(kind, "it is nested too deeply") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise refused(kind, f"it is not valid JSON: {error}") from None
