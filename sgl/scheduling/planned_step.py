"""A step that was planned: who takes part, and whose tokens are sampled under a grammar."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sgl.constrained.matcher import Matcher
from sgl.scheduling.request import Request


class Part(NamedTuple):
    """A prompt's share of a step: after it, KV of `end` tokens is there.

    has_output  whether the step makes a token of it, or the vector that it wants
    """

    request: Request
    end: int
    has_output: bool


@dataclass(slots=True)
class Step:
    """A planned step whose result has not come yet.

    decodes  requests that get a token each, in the order of the plan's rows
    prompts  in the order of the plan's chunks
    masked   which of the sampled tokens, counted as in the result, have masks that nobody was told
    emptied  requests that have lost their KV since the step was planned
    skipped  requests that went another way since: what the step makes of them is not wanted
    """

    number: int
    decodes: list[Request]
    prompts: list[Part] = field(default_factory=list)
    masked: list[tuple[int, Request, Matcher]] = field(default_factory=list)
    emptied: set[Request] = field(default_factory=set)
    skipped: set[Request] = field(default_factory=set)

    @property
    def num_rows(self) -> int:
        return len(self.decodes) + len(self.prompts)

    def rows(self) -> list[Request]:
        """All that take part, in the order of the result's indices."""
        return self.decodes + [part.request for part in self.prompts]

    def wants(self, request: Request) -> bool:
        return not (request.is_finished or request in self.skipped)

    def find_masked(self) -> None:
        """Once all parts are there."""
        self.masked = [
            (index, request, request.matcher)
            for index, request in enumerate(self._sampled())
            if request.matcher is not None
        ]

    def _sampled(self) -> Iterator[Request]:
        yield from self.decodes
        yield from (part.request for part in self.prompts if part.has_output)
