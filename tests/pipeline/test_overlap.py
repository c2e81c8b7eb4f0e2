"""The scheduler is a step ahead: a plan is on its way before the result of the one before it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from prompts import PROMPTS

import sgl

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(300)]


def traced_steps(trace: Path, num_tokens: int, **flags: Any) -> list[dict[str, float]]:
    """The steps of three answers of `num_tokens` tokens each."""
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    prompts = [PROMPTS[name] for name in ("short-france", "short-story", "chat-turns")]
    flags |= {"trace_steps": str(trace), "num_cpu_threads": 1, "random_seed": 0}
    with sgl.Engine(**flags) as engine:
        outputs = engine.generate(prompts, sampling)
    assert [len(output["output_ids"]) for output in outputs] == [num_tokens] * 3
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(len(steps)))
    return steps


def share_overlapped(steps: list[dict[str, float]]) -> float:
    """In how many of the steps the next plan was sent before the result was there."""
    pairs = list(itertools.pairwise(steps))
    return sum(later["sent"] < earlier["arrived"] for earlier, later in pairs) / len(pairs)


def test_the_next_plan_is_sent_before_the_result_is_there(tmp_path):
    steps = traced_steps(tmp_path / "steps.jsonl", num_tokens=220)
    assert len(steps) > 200
    assert share_overlapped(steps) >= 0.95


def test_without_overlap_every_plan_waits_for_the_result_before_it(tmp_path):
    steps = traced_steps(tmp_path / "steps.jsonl", num_tokens=20, disable_overlap_schedule=True)
    assert share_overlapped(steps) == 0.0
