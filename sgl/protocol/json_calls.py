"""Calls that are JSON objects: `{"name": …, "arguments": {…}}` between a model's own markers.

    outside ──opening──▶ inside ──{──▶ object ──}──▶ call, after ──closing──▶ outside
       ▲                   ▲             │  │           │
       │                   └─ separator ─│──│───────────┘
       └── it is content after all ──────┘  └── enough was held: arguments ──▶ tail ──▶ after

A call is told once it is known to be one: when its object has ended. An object that gets long is
told from then on as it grows, so that a client sees long arguments being written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from sgl.protocol.answer_parts import Content, Part, SteppedParser, held_len, space_len
from sgl.protocol.bracket_span import JSON, BracketSpan, Outcome

HOLD_CHARS = 1024  # of an object, until its arguments are told before they have ended
MAX_HEAD_CHARS = 1024
KEYS = frozenset(("name", "arguments", "parameters", "id", "type"))
_FIRST_KEY = re.compile(r'\{\s*"([^"\\\x00-\x1f]*)"')
_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{'
)


class JsonSyntax(NamedTuple):
    """What stands around the objects.

    opening     begins calls, anywhere in the text
    bracket     follows the opening
    separator   may follow a call; another one comes then
    closing     may follow the last call
    is_bare     at the beginning of an answer, and after a call, no opening is needed
    """

    opening: str
    bracket: str = ""
    separator: str = ""
    closing: str = ""
    is_bare: bool = False


class JsonCallParser(SteppedParser):
    """Calls of the functions called `names`; a call of anything else is content.

    hold_chars   0 where a grammar makes sure that what looks like a call is one
    """

    def __init__(
        self, syntax: JsonSyntax, names: Collection[str], hold_chars: int = HOLD_CHARS
    ) -> None:
        super().__init__(self._begin if syntax.is_bare else self._outside)
        self._syntax = syntax
        self._names = names
        self._hold_chars = hold_chars
        self._at = 0  # where in the text, which begins with what may be a call, the object begins
        self._scanned = 0
        self._bracket = ""  # what must come before the object
        self._span = BracketSpan(JSON)
        self._drops_space = False  # behind a call

    def finish(self) -> list[Part]:
        rest = self._text
        if self._go_on == self._after and self._syntax.closing.startswith(rest.strip()):
            rest = ""
        if self._go_on not in (self._arguments, self._tail):  # those belong to a call
            self._tell(rest)
        self._text = ""
        return self._take()

    def _begin(self) -> bool:
        at = space_len(self._text)
        if at == len(self._text):
            return False
        if self._text[at] == "{":
            self._expect_object(at)
        else:
            self._go_on = self._outside
        return True

    def _outside(self) -> bool:
        opening = self._syntax.opening
        at = self._text.find(opening)
        end = at if at >= 0 else len(self._text) - held_len(self._text, opening)
        num_shown = len(self._text[:end].rstrip())  # spaces before a call do not count
        self._tell(self._text[:num_shown])
        self._text = self._text[num_shown:]
        if at < 0:
            return False
        self._expect_object(at - num_shown + len(opening), self._syntax.bracket)
        return True

    def _expect_object(self, at: int, bracket: str = "") -> None:
        self._at, self._bracket = at, bracket
        self._go_on = self._inside

    def _inside(self) -> bool:
        at = space_len(self._text, self._at)
        if at == len(self._text):
            return False
        if self._bracket and self._text[at] == self._bracket:
            self._expect_object(at + 1)
        elif self._bracket or self._text[at] != "{":
            self._give_up(at)
        else:
            self._at = self._scanned = at
            self._span = BracketSpan(JSON)
            self._go_on = self._object
        return True

    def _object(self) -> bool:
        key = _FIRST_KEY.match(self._text, self._at, self._at + MAX_HEAD_CHARS)
        if key is not None and key[1] not in KEYS:
            self._give_up(key.end())
            return True
        head = _HEAD.match(self._text, self._at, self._at + MAX_HEAD_CHARS)
        told_from = self._told_from(head)
        outcome, at = self._span.scan(self._text[:told_from], self._scanned)
        self._scanned = at
        if outcome is Outcome.BROKEN:
            self._give_up(at)
        elif outcome is Outcome.CLOSED:
            self._accept(at)
        elif head is not None and at == told_from:
            self._begin_arguments(head)
        else:
            return False
        return True

    def _told_from(self, head: re.Match[str] | None) -> int | None:
        """How far an object may go before its arguments are told; None: to its end."""
        if head is None or _decoded(head[1]) not in self._names:
            return None
        return max(self._at + self._hold_chars, head.end())

    def _accept(self, end: int) -> None:
        call = read_call(self._text[self._at : end])
        if call is None or call.name not in self._names:
            self._give_up(end)
            return
        self._tell_call(call.name)
        self._tell_arguments(call.arguments)
        self._text = self._text[end:]
        self._go_on = self._after

    def _begin_arguments(self, head: re.Match[str]) -> None:
        self._tell_call(_decoded(head[1]))
        self._text = self._text[head.end() - 1 :]
        self._span = BracketSpan(JSON, "}")
        self._go_on = self._arguments

    def _arguments(self) -> bool:
        outcome, at = self._span.scan(self._text, 0, floor=1)
        self._tell_arguments(self._text[:at])
        self._text = self._text[at:]
        self._scanned = 0
        self._go_on = {
            Outcome.OPEN: self._arguments,
            Outcome.CLOSED: self._tail,
            Outcome.BROKEN: self._outside,
        }[outcome]
        return outcome is not Outcome.OPEN

    def _tail(self) -> bool:
        """What follows the arguments inside their object: its end."""
        outcome, at = self._span.scan(self._text, self._scanned)
        self._scanned = at
        if outcome is Outcome.BROKEN:
            self._give_up(at)
        elif outcome is Outcome.CLOSED:
            self._text = self._text[at:]
            self._go_on = self._after
        return outcome is not Outcome.OPEN

    def _after(self) -> bool:
        at = space_len(self._text)
        rest, syntax = self._text[at:], self._syntax
        if syntax.separator and rest.startswith(syntax.separator):
            self._expect_object(at + len(syntax.separator))
        elif syntax.is_bare and rest.startswith("{"):
            self._expect_object(at)
        elif syntax.closing and rest.startswith(syntax.closing):
            self._leave(at + len(syntax.closing))
        elif not rest or syntax.closing.startswith(rest):
            return False
        else:
            self._leave(0)
        return True

    def _leave(self, at: int) -> None:
        self._text = self._text[at:]
        self._drops_space = True
        self._go_on = self._outside

    def _give_up(self, at: int) -> None:
        """It is no call: what was looked at is content."""
        self._tell(self._text[:at])
        self._text = self._text[at:]
        self._go_on = self._outside

    def _tell(self, text: str) -> None:
        if self._drops_space:
            text = text.lstrip()
        if text:
            self._parts.append(Content(text))
            self._drops_space = False


class Call(NamedTuple):
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str


def read_call(text: str) -> Call | None:
    """The call that a JSON object describes, arguments as they are written; None: it does not."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not KEYS.issuperset(fields):
        return None
    name = fields.get("name")
    if not isinstance(name, str):
        return None
    if (head := _HEAD.match(text)) is not None:
        start = head.end() - 1
        _, end = BracketSpan(JSON).scan(text, start)
        return Call(name, text[start:end])
    arguments = _as_object(fields.get("arguments", fields.get("parameters")))
    return None if arguments is None else Call(name, arguments)


def _as_object(arguments: Any) -> str | None:
    """Arguments that are missing are none; some models write the object as a string."""
    if isinstance(arguments, str):
        try:
            return arguments if isinstance(json.loads(arguments), dict) else None
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        return "{}"
    return json.dumps(arguments) if isinstance(arguments, dict) else None


def _decoded(text: str) -> str:
    """The string that a piece of JSON stands for; empty where it is none."""
    try:
        return str(json.loads(text))
    except ValueError:
        return ""
