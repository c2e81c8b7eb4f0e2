"""Where a bracketed text ends that arrives in pieces: a JSON object, the arguments of a call."""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

MAX_DEPTH = 64
_CLOSERS = {"{": "}", "[": "]", "(": ")"}


class Outcome(Enum):
    OPEN = "open"  # more text is needed
    CLOSED = "closed"
    BROKEN = "broken"  # this can never become right


class Scan(NamedTuple):
    """`at` is behind the last character that was looked at; the one that broke it is not."""

    outcome: Outcome
    at: int


class Spelling(NamedTuple):
    """What a language allows. A coarse net: whoever reads the whole text in the end decides.

    brackets those that may open
    quotes   what strings stand in
    string   characters of a string, other than quotes and backslashes
    plain    characters outside of strings and brackets
    """

    brackets: str
    quotes: str
    string: re.Pattern[str]
    plain: re.Pattern[str]


JSON = Spelling("{[", '"', re.compile(r'[^"\\\x00-\x1f]*'), re.compile(r"[\s:,+.\-0-9eEtrufalsn]*"))
PYTHON = Spelling("{[(", "\"'", re.compile(r"[^\"'\\]*"), re.compile(r"[^\"'\[\](){}\\]*"))


class BracketSpan:
    """Counts brackets outside of strings. `closers` are those that are open already."""

    def __init__(self, spelling: Spelling, closers: str = "") -> None:
        self._spelling = spelling
        self._closers = list(closers)
        self._quote = ""  # the one that the string we are in began with
        self._is_escaped = False

    def scan(self, text: str, start: int, floor: int = 0) -> Scan:
        """Go on from `start` until only `floor` brackets are open."""
        at = start
        while at < len(text):
            passed = self._step_in_string(text, at) if self._quote else self._step(text, at)
            if passed == at:
                return Scan(Outcome.BROKEN, at)
            at = passed
            if len(self._closers) == floor and not self._quote:
                return Scan(Outcome.CLOSED, at)
        return Scan(Outcome.OPEN, at)

    def _step_in_string(self, text: str, at: int) -> int:
        char = text[at]
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == self._quote:
            self._quote = ""
        elif char not in self._spelling.quotes:
            return _end(self._spelling.string, text, at)
        return at + 1

    def _step(self, text: str, at: int) -> int:
        """Behind the next piece; `at` itself where no such piece may be."""
        char = text[at]
        if char in self._spelling.quotes:
            self._quote = char
        elif char in self._spelling.brackets and len(self._closers) < MAX_DEPTH:
            self._closers.append(_CLOSERS[char])
        elif self._closers and char == self._closers[-1]:
            self._closers.pop()
        else:
            return _end(self._spelling.plain, text, at)
        return at + 1


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()
