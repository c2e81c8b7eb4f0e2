"""A profile goes through the whole engine, on every rank, and is written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from pipeline.server import wait_until
from toy import toy_settings

import sgl
from sgl.errors import InvalidRequestError

SAMPLING = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}


def step_numbers(path: Path) -> list[int]:
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    return sorted(int(name.split()[1]) for name in names if name.startswith("step "))


@pytest.mark.slow
def test_both_ranks_write_the_steps_of_an_answer(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path / "toy") | {"num_cpu_threads": 1, "tp_size": 2}
    with sgl.Engine(**settings) as engine:
        before = engine.generate("Once", SAMPLING)["output_ids"]
        with pytest.raises(InvalidRequestError, match="no profile is running"):
            engine.stop_profile()
        assert "when it is stopped" in engine.start_profile(tmp_path / "traces")
        assert engine.generate("Once", SAMPLING)["output_ids"] == before
        with pytest.raises(InvalidRequestError, match="stop it first"):
            engine.start_profile()
        assert "Profile of 8 steps written" in engine.stop_profile()

        def paths() -> list[Path]:
            return sorted((tmp_path / "traces").glob("rank*.trace.json.gz"))

        assert wait_until(lambda: len(paths()) == 2, 10.0)
        engine.generate("Once", SAMPLING)  # so both ranks are through with writing
        steps = [step_numbers(path) for path in paths()]
        assert steps == [list(range(8, 16))] * 2
