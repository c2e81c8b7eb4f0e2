"""A step that was planned: who takes part, and whose tokens are sampled under a grammar."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from sgl.constrained.matcher import Matcher
from sgl.scheduling.request import Request


class Part(NamedTuple):
    """One request's share of a step: after it, KV of `end` tokens is there.

    epoch       num_retractions when planned; another one now means its KV is gone
    has_output  whether the step makes a token of it, or the vector that it wants
    """

    request: Request
    epoch: int
    end: int
    has_output: bool
    is_prefill: bool


@dataclass(slots=True)
class Step:
    """A planned step whose result has not come yet; parts are in the order of the plan's rows.

    masked  which of the sampled tokens, counted as in the result, have masks that nobody was told
    """

    number: int
    parts: list[Part] = field(default_factory=list)
    masked: list[tuple[int, Request, Matcher]] = field(default_factory=list)

    def find_masked(self) -> None:
        """Once all parts are there."""
        sampled = (part.request for part in self.parts if part.has_output)
        self.masked = [
            (index, request, request.matcher)
            for index, request in enumerate(sampled)
            if request.matcher is not None
        ]
