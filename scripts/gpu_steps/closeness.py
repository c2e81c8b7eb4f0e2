"""How far the log-probabilities of two runs of one model are apart, and whether that is too far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BAR = 2e-2  # the most that two logits of one token may differ by
MARGIN = 2.0  # errors of bfloat16 of two devices, both against float32, are alike up to this factor


@dataclass(frozen=True)
class Position:
    """One token of a text, and the log-probabilities known there: its own and those of others."""

    token_id: int
    logprobs: dict[int, float]


Sequences = Sequence[Sequence[Position]]


def positions(output: dict[str, Any]) -> list[Position]:
    """Those of an output of `Engine.generate`, the prompt's first; all three kinds must be there.

    The very first token of a prompt has no log-probability and is left out.
    """
    meta = output["meta_info"]
    found = []
    for side in ("input", "output"):
        kinds = (meta[f"{side}_{kind}_logprobs"] for kind in ("token", "top", "token_ids"))
        for row, top, named in zip(*kinds, strict=True):
            if row[0] is not None:
                values = {token_id: value for value, token_id, _ in (row, *top, *named)}
                found.append(Position(row[1], values))
    return found


@dataclass(frozen=True)
class Distance:
    """Of two runs over the same texts: largest, 99th percentile and mean absolute difference.

    chosen_…  of the texts' own tokens alone, which are `num_chosen` of `num`
    """

    max_abs: float
    p99: float
    mean: float
    chosen_max: float
    chosen_mean: float
    num: int
    num_chosen: int

    @classmethod
    def between(cls, ours: Sequences, theirs: Sequences) -> Distance:
        """Compares each text up to the first token that differs: what follows differs rightly."""
        pairs = [
            pair for texts in zip(ours, theirs, strict=True) for pair in _with_same_past(*texts)
        ]
        every_N = np.array([gap for pair in pairs for gap in _gaps(*pair)])
        chosen_N = np.array(
            [
                abs(mine.logprobs[mine.token_id] - other.logprobs[other.token_id])
                for mine, other in pairs
                if mine.token_id == other.token_id
            ]
        )
        return cls(
            max_abs=float(every_N.max()),
            p99=float(np.quantile(every_N, 0.99)),
            mean=float(every_N.mean()),
            chosen_max=float(chosen_N.max()),
            chosen_mean=float(chosen_N.mean()),
            num=len(every_N),
            num_chosen=len(chosen_N),
        )

    def is_close(self, floor: Distance | None = None) -> bool | None:
        """Whether all of it is within BAR; None where `floor`, of the format, is beyond it too.

        A difference that is not a number is never close.
        """
        if self.max_abs <= BAR:
            return True
        is_beyond_format = floor is not None and floor.max_abs > BAR
        return None if is_beyond_format and np.isfinite(self.max_abs) else False

    def is_like(self, floor: Distance) -> bool:
        """Whether it is an error of the size that the number format has anyway."""
        return self.mean <= MARGIN * floor.mean and self.p99 <= MARGIN * floor.p99

    def figures(self) -> dict[str, float]:
        return {
            name: value if isinstance(value, int) else float(f"{value:.3g}")
            for name, value in asdict(self).items()
        }


def _with_same_past(
    ours: Sequence[Position], theirs: Sequence[Position]
) -> Iterator[tuple[Position, Position]]:
    """The first position where the tokens differ is the last that can be compared."""
    for mine, other in zip(ours, theirs, strict=False):
        yield mine, other
        if mine.token_id != other.token_id:
            return


def _gaps(mine: Position, other: Position) -> Iterator[float]:
    """Of the tokens that both know."""
    for token_id, value in mine.logprobs.items():
        if token_id in other.logprobs:
            yield abs(value - other.logprobs[token_id])
