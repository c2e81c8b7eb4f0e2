"""Profiles of a worker: what is recorded, what is written, and what is told when it cannot be."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sgl.actors.channel import LocalChannel
from sgl.actors.worker import Worker
from sgl.execution import profiler
from sgl.execution.profiler import StepProfiler
from sgl.execution.runner import StepOutput
from sgl.messages import Reply, StartProfile, StepPlan, StepResult, StopProfile, pack


class DoublingRunner:
    """Answers step N with the token 2 N."""

    def __init__(self, rank=0):
        self.tp = SimpleNamespace(rank=rank)
        self.table = SimpleNamespace(device=torch.device("cpu"))

    def run(self, plan, masks):
        return StepOutput(plan.step, torch.tensor([plan.step]) * 2, [])


def never() -> None:
    raise AssertionError("the worker waits")


class Bench:
    """A worker, and what it says to the messages it is given."""

    def __init__(self, rank=0):
        self.messages, self.results = LocalChannel(), LocalChannel()
        sender = self.results.sender if rank == 0 else None
        self.worker = Worker(DoublingRunner(rank), None, self.messages.receiver, sender, wait=never)

    def tell(self, *messages):
        for message in messages:
            self.messages.sender.send(message)
        self.worker.turn()
        return self.results.receiver.receive()


def events_of(path):
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def steps_of(path):
    names = [event["name"] for event in events_of(path) if event.get("cat") == "user_annotation"]
    return sorted(name for name in names if name.startswith("step "))


def test_the_steps_between_start_and_stop_are_in_the_trace(tmp_path):
    bench = Bench()
    told = bench.tell(
        StepPlan(1),
        StartProfile(5, "now", str(tmp_path / "new")),
        StepPlan(2),
        StepPlan(3),
        StopProfile(6),
        StepPlan(4),
    )
    path = tmp_path / "new" / "rank0-now.trace.json.gz"
    assert told == [
        StepResult(1, pack([2])),
        Reply(5, True, f"Profiling; the trace will be {path}, when it is stopped."),
        StepResult(2, pack([4])),
        StepResult(3, pack([6])),
        Reply(6, True, f"Profile of 2 steps written to {path}"),
        StepResult(4, pack([8])),
    ]
    assert steps_of(path) == ["step 2", "step 3"]
    assert sum(event["name"] == "aten::mul" for event in events_of(path)) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_profile_ends_by_itself_and_stop_then_tells_where_it_is_once(tmp_path):
    bench = Bench()
    plans = [StepPlan(step) for step in range(5)]
    bench.tell(StartProfile(1, "now", str(tmp_path), num_steps=3), *plans)
    path = tmp_path / "rank0-now.trace.json.gz"
    assert steps_of(path) == ["step 0", "step 1", "step 2"]
    assert bench.tell(StopProfile(2)) == [
        Reply(2, True, f"Profile of 3 steps written to {path}"),
    ]
    [reply] = bench.tell(StopProfile(3))
    assert (reply.ok, reply.text) == (False, "no profile is running: start one first")


def test_other_ranks_write_theirs_and_say_nothing(tmp_path):
    bench = Bench(rank=1)
    told = bench.tell(StartProfile(1, "now", str(tmp_path)), StepPlan(7), StopProfile(2))
    assert told == []
    assert steps_of(tmp_path / "rank1-now.trace.json.gz") == ["step 7"]


def test_a_second_start_is_refused_and_the_first_goes_on(tmp_path):
    bench = Bench()
    first, second = (StartProfile(k, f"stamp{k}", str(tmp_path)) for k in (1, 2))
    _, refusal, _, done = bench.tell(first, second, StepPlan(0), StopProfile(3))
    assert not refusal.ok
    assert "rank0-stamp1.trace.json.gz: stop it first" in refusal.text
    assert done.ok
    assert [path.name for path in tmp_path.iterdir()] == ["rank0-stamp1.trace.json.gz"]


def test_a_folder_that_cannot_be_written_is_found_out_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    bench = Bench()
    refusal, result = bench.tell(StartProfile(1, "now", str(tmp_path / "file/sub")), StepPlan(3))
    assert not refusal.ok
    assert "no trace can be written to" in refusal.text
    assert result == StepResult(3, pack([6]))


def test_a_trace_that_cannot_be_written_any_more_is_told(tmp_path):
    bench = Bench()
    bench.tell(StartProfile(1, "now", str(tmp_path / "gone")), StepPlan(0))
    (tmp_path / "gone").rmdir()
    [reply] = bench.tell(StopProfile(2))
    assert not reply.ok
    assert reply.text.startswith("the profile failed: ")
    assert str(tmp_path / "gone") in reply.text
    bench.tell(StartProfile(3, "later", str(tmp_path), num_steps=1), StepPlan(1))
    assert steps_of(tmp_path / "rank0-later.trace.json.gz") == ["step 1"]


def test_a_gpu_is_recorded_only_where_there_is_one():
    [refusal] = Bench().tell(StartProfile(1, "now", activities=("GPU",)))
    assert not refusal.ok
    assert "runs on the CPU" in refusal.text
    start = StartProfile(1, "now")
    names = [each.name for each in StepProfiler(0, has_gpu=True)._activities(start)]
    assert names == ["CPU", "CUDA"]


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, tempfile.gettempdir()),
        ({"SGLANG_TORCH_PROFILER_DIR": "/old"}, "/old"),
        ({"SGLANG_TORCH_PROFILER_DIR": "/old", "SGL_TORCH_PROFILER_DIR": "/new"}, "/new"),
    ],
)
def test_the_environment_says_where_traces_go(monkeypatch, environment, folder):
    for name in profiler.FOLDER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Path(profiler.default_folder()) == Path(folder)
