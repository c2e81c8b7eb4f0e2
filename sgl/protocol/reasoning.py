"""Reasoning before the answer: `<think>…</think>`, and where in it a prompt leaves the model."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from sgl.protocol.answer_parts import Content, Part, Thought, held_len, joined, space_len

OPEN, CLOSE = "<think>", "</think>"


class ReasoningFormat(NamedTuple):
    """`is_certain`: the model always thinks, whether its text begins with the marker or not."""

    name: str
    is_certain: bool


REASONING_FORMATS = {
    each.name: each
    for each in (
        ReasoningFormat("deepseek-r1", is_certain=True),
        ReasoningFormat("qwen3", is_certain=False),
    )
}


class Thinking(Enum):
    """What the next text of the model is."""

    BEGUN = "begun"  # thoughts; a marker that opens them may come again
    POSSIBLE = "possible"  # thoughts if the marker comes first
    OVER = "over"


def thinking_after(prompt: str, form: ReasoningFormat) -> Thinking:
    """Where a prompt leaves the model: templates may open its thoughts, or close them at once."""
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return Thinking.BEGUN
    if end.endswith(CLOSE):
        return Thinking.OVER
    return Thinking.BEGUN if form.is_certain else Thinking.POSSIBLE


def thinking_in(prefill: str, before: Thinking) -> Thinking:
    """The same, where the client has begun the answer."""
    opened, closed = prefill.rfind(OPEN), prefill.rfind(CLOSE)
    if opened == closed:  # neither is there
        return Thinking.OVER if before is Thinking.POSSIBLE and prefill.strip() else before
    return Thinking.BEGUN if opened > closed else Thinking.OVER


class ReasoningParser:
    """Splits thoughts from the rest. Spaces around the markers go."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._text = ""  # what is not told yet
        self._go_on: Callable[[], list[Part]] = (
            self._rest if thinking is Thinking.OVER else self._begin
        )
        self._drops_space = thinking is Thinking.BEGUN

    def feed(self, text: str) -> list[Part]:
        self._text += text
        return joined(self._go_on())

    def finish(self) -> list[Part]:
        text, self._text = self._text, ""
        is_thought = self._go_on == self._inside or (
            self._go_on == self._begin and self._thinking is Thinking.BEGUN
        )
        if is_thought:
            return joined([Thought(text.strip() if self._drops_space else text.rstrip())])
        return joined([Content(text)])

    def _begin(self) -> list[Part]:
        at = space_len(self._text)
        rest = self._text[at:]
        if OPEN.startswith(rest) and rest != OPEN:
            return []
        if rest.startswith(OPEN):
            self._text = rest[len(OPEN) :]
        elif self._thinking is Thinking.POSSIBLE:
            self._go_on = self._rest
            return self._rest()
        self._drops_space = True
        self._go_on = self._inside
        return self._inside()

    def _inside(self) -> list[Part]:
        text = self._text.lstrip() if self._drops_space else self._text
        thought, close, rest = text.partition(CLOSE)
        if close:
            self._text = rest
            self._drops_space = True
            self._go_on = self._rest
            return [Thought(thought.rstrip()), *self._rest()]
        num_shown = len(text[: len(text) - held_len(text, CLOSE)].rstrip())
        self._text = text[num_shown:]
        self._drops_space = self._drops_space and num_shown == 0
        return [Thought(text[:num_shown])]

    def _rest(self) -> list[Part]:
        text, self._text = self._text, ""
        if self._drops_space:
            text = text.lstrip()
        self._drops_space = self._drops_space and not text
        return [Content(text)]
