"""What `transformers` answers to the fixed prompts, and the comparison of outputs with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "data" / "smollm2_greedy.json"
NUM_ANSWER_TOKENS = 64
TIE = 1e-4  # float32 logits so close may change places when the order of a sum changes


@dataclass(frozen=True)
class Answer:
    """What transformers makes of one prompt, greedily, in float32.

    prompt_logprobs  of every prompt token but the first
    gaps             by how much the logit of each output token beats the next best
    """

    prompt_ids: list[int]
    prompt_logprobs: list[float]
    output_ids: list[int]
    text: str
    gaps: list[float]

    @property
    def finish_reason(self) -> dict[str, Any]:
        if len(self.output_ids) == NUM_ANSWER_TOKENS:
            return {"type": "length", "length": NUM_ANSWER_TOKENS}
        return {"type": "stop", "matched": self.output_ids[-1]}

    def agrees(self, output: dict[str, Any]) -> bool:
        meta = output["meta_info"]
        return bool(
            self.output_ids == output["output_ids"]
            and self.text == output["text"]
            and self.finish_reason == meta["finish_reason"]
            and len(self.prompt_ids) == meta["prompt_tokens"]
            and len(self.output_ids) == meta["completion_tokens"]
        )

    def parts_at_tie(self, output_ids: list[int], tie: float) -> bool:
        """Whether the first token that differs is one where the model was undecided."""
        pairs = enumerate(zip(self.output_ids, output_ids, strict=False))
        where = next((index for index, (theirs, ours) in pairs if theirs != ours), None)
        return where is not None and self.gaps[where] < tie


@dataclass(frozen=True)
class Reference:
    """The answers by the names of their prompts; `sha256` is of the model file."""

    sha256: str
    max_new_tokens: int
    answers: dict[str, Answer]

    @classmethod
    def load(cls) -> Reference:
        content = json.loads(PATH.read_text(encoding="utf-8"))
        answers = {name: Answer(**fields) for name, fields in content["answers"].items()}
        return cls(content["sha256"], content["max_new_tokens"], answers)


@dataclass
class Comparison:
    """Of one mode's outputs with the answers: `add` each, then `done` asserts what was found.

    An answer that parts from the reference where two logits are closer than `tie` is excused.
    """

    mode: str
    report: Callable[[str], None]
    tie: float = TIE
    max_excused: int = 1
    started: float = field(default_factory=time.monotonic)
    num_equal: int = 0
    excused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, answer: Answer, output: dict[str, Any]) -> None:
        if answer.agrees(output):
            self.num_equal += 1
        elif answer.parts_at_tie(output["output_ids"], self.tie):
            self.excused.append(name)
        else:
            self.wrong.append(
                f"{name}: {output}, but transformers: {answer.text!r} {answer.output_ids}"
            )

    def done(self, num_expected: int) -> None:
        """Nothing was wrong, and nothing was left out."""
        num_compared = self.num_equal + len(self.excused) + len(self.wrong)
        self.report(
            f"{self.mode}: {num_compared} compared, {self.num_equal} equal, "
            f"{len(self.excused)} excused, {time.monotonic() - self.started:.1f} s"
        )
        assert num_compared == num_expected, f"{num_compared} of {num_expected} were compared"
        assert not self.wrong, "\n".join(self.wrong)
        assert len(self.excused) <= self.max_excused, f"too many part at ties: {self.excused}"
