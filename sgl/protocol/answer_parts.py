"""What a model's text consists of, once it is read: thoughts, text and calls of functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Thought:
    """Some more of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Some more of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a function; its arguments follow. `index` counts the calls of an answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Some more of the JSON object that a call passes."""

    index: int
    text: str


Part: TypeAlias = Thought | Content | CallBegun | Arguments


class TextParser(Protocol):
    """Reads text that comes in pieces; the parts do not depend on where it was cut."""

    def feed(self, text: str) -> list[Part]:
        """What is certain now."""

    def finish(self) -> list[Part]:
        """The text has ended: the rest."""


class SteppedParser:
    """Goes on over a growing text step by step.

    A step looks at `_text`, what is not told yet, and tells parts; True: it has decided something,
    so `_go_on`, which may be another one now, is to look again.
    """

    def __init__(self, first: Callable[[], bool]) -> None:
        self._text = ""
        self._parts: list[Part] = []
        self._go_on = first
        self._num_calls = 0

    def feed(self, text: str) -> list[Part]:
        self._text += text
        while self._go_on():
            pass
        return self._take()

    def _take(self) -> list[Part]:
        parts, self._parts = joined(self._parts), []
        return parts

    def _tell_call(self, name: str) -> None:
        self._parts.append(CallBegun(self._num_calls, name))
        self._num_calls += 1

    def _tell_arguments(self, text: str) -> None:
        """Of the newest call."""
        self._parts.append(Arguments(self._num_calls - 1, text))


def joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one kind become one part; empty ones go."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, CallBegun):
            found.append(part)
            continue
        if not part.text:
            continue
        last = found[-1] if found else None
        if isinstance(part, Thought) and isinstance(last, Thought):
            found[-1] = Thought(last.text + part.text)
        elif isinstance(part, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + part.text)
        elif isinstance(part, Arguments) and isinstance(last, Arguments):
            found[-1] = Arguments(last.index, last.text + part.text)
        else:
            found.append(part)
    return found


def held_len(text: str, marker: str) -> int:
    """How many characters at the end of `text` may turn out to begin `marker`."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


def space_len(text: str, start: int = 0) -> int:
    """Where the first character from `start` on that is no space stands, or the end."""
    return len(text) - len(text[start:].lstrip())
