"""What is made of the CPU times and the profile behind `benchmarks.gpu_idle`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from benchmarks import cpu_time, gpu_idle
from benchmarks.cpu_time import Spent
from benchmarks.workloads import equal
from scripts.gpu_gaps import Span, Trace

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def write_process(proc, pid, title, parent, user_ticks=0, system_ticks=0):
    """A process of a /proc of our own; proc(5) numbers the fields from 1."""
    fields = [str(pid), f"({title[:15]})", "S", str(parent), *map(str, range(105, 114))]
    fields += [str(user_ticks), str(system_ticks), "9000", "9000"]
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "stat").write_text(" ".join(fields) + "\n")
    (folder / "cmdline").write_bytes(title.encode() + b"\0--flag\0")


# CPU time


def test_cpu_time_is_user_plus_system_whatever_the_name_of_the_process(tmp_path):
    write_process(tmp_path, 7, "a) R 1 (b", 1, user_ticks=250, system_ticks=75)
    assert cpu_time.cpu_seconds(7, tmp_path) == pytest.approx(325 * TICK_S)


def test_cpu_time_of_this_process_is_what_the_clock_says():
    before = time.process_time()
    seconds = cpu_time.cpu_seconds(os.getpid())
    assert before - 3 * TICK_S <= seconds <= time.process_time() + 3 * TICK_S


def test_processes_are_those_of_the_engine_of_this_caller(tmp_path):
    write_process(tmp_path, 10, "python", 1)
    write_process(tmp_path, 11, "sgl::scheduler", 10)
    write_process(tmp_path, 12, "sgl::detokenizer", 10)
    write_process(tmp_path, 13, "sgl::worker0", 99)  # of another engine
    write_process(tmp_path, 14, "compiler of sgl::worker0", 10)
    (tmp_path / "15").mkdir()  # ends while we look
    (tmp_path / "uptime").write_text("1 2")
    found = cpu_time.engine_processes(10, tmp_path)
    assert list(found.items()) == [("caller", 10), ("detokenizer", 12), ("scheduler", 11)]


def test_a_process_with_a_title_is_found():
    code = "from setproctitle import setproctitle as title; title('sgl::worker7'); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        assert cpu_time.engine_processes(os.getpid())["worker7"] == child.pid
        child.communicate(b"\n")


def test_the_decode_phase_is_long_answers_less_short_ones():
    first = Spent(6, 0.5, {"caller": 0.3, "scheduler": 0.2})
    whole = Spent(206, 2.5, {"caller": 0.3, "scheduler": 0.6})
    figures = gpu_idle.cpu_figures(whole - first)
    assert figures == {
        "steps": 200,
        "parts": {
            "step": {"ms": 10.0, "share": 1.0},
            "caller": {"ms": 0.0, "share": 0.0},
            "scheduler": {"ms": 2.0, "share": 0.2},
        },
    }


class FakeEngine:
    """Two prompt tokens more are planned whenever somebody looks, from `generate` on."""

    def __init__(self):
        self.is_running, self.is_profiled = threading.Event(), threading.Event()
        self.num_prompt_tokens = 100
        self.profiled_at = None

    def get_server_info(self):
        if self.is_running.is_set() and self.num_prompt_tokens < 100 + 2 * 10:
            self.num_prompt_tokens += 2
        return {
            "num_prefill_tokens": self.num_prompt_tokens - 40.0,
            "num_cached_tokens": 40.0,
            "num_steps": 3.0,
        }

    def generate(self, work):
        self.is_running.set()
        assert self.is_profiled.wait(10)
        return work.output_lens

    def start_profile(self, folder, num_steps):
        self.profiled_at = self.num_prompt_tokens
        (folder / "rank1-x.trace.json.gz").touch()
        (folder / "rank0-x.trace.json.gz").touch()
        self.is_profiled.set()

    def stop_profile(self):
        assert self.is_profiled.is_set()


def test_a_profile_starts_behind_the_last_prompt(tmp_path):
    engine = FakeEngine()
    peer = SimpleNamespace(engine=engine, generate=engine.generate)
    path = gpu_idle.profile_decodes(peer, equal(0, 2, 10, 50), tmp_path)
    assert engine.profiled_at == 100 + 2 * 10
    assert path == tmp_path / "rank0-x.trace.json.gz"


def test_an_engine_that_fails_is_not_waited_for(tmp_path):
    engine = FakeEngine()

    def generate(work):
        raise RuntimeError("no memory")

    peer = SimpleNamespace(engine=engine, generate=generate)
    with pytest.raises(RuntimeError, match="no memory"):
        gpu_idle.profile_decodes(peer, equal(0, 2, 10, 50), tmp_path)


# the profile


SLOW_START = [1e6] * gpu_idle.UNSETTLED_STEPS


def trace_of(gaps, launch="cudaGraphLaunch"):
    """Steps that are 60 us busy, 10 idle and 20 busy, with these gaps between them."""
    trace, begin = Trace(), 0.0
    for number, gap in enumerate([*gaps, 0.0]):
        trace.steps.append(Span(f"step {number}", begin, begin + 5))
        trace.launches.append(Span(launch, begin + 1, begin + 2, number))
        trace.work.append(Span("gemm", begin + 10, begin + 70, number))
        trace.work.append(Span("norm", begin + 80, begin + 100, number))
        begin += 90 + gap
    return trace


def test_idle_time_is_that_of_the_settled_steps_that_another_one_follows():
    assert gpu_idle.gpu_figures(trace_of([*SLOW_START, *[10.0] * 8])) == {
        "steps": 8,
        "parts": {
            "step": {"us": 100.0, "share": 1.0},
            "idle between": {"us": 10.0, "share": 0.1},
            "idle inside": {"us": 10.0, "share": 0.1},
        },
    }


def test_a_single_long_gap_counts_in_the_share_but_not_in_the_median():
    parts = gpu_idle.gpu_figures(trace_of([*SLOW_START, *[10.0] * 5, 410.0]))["parts"]
    assert parts["idle between"] == {"us": 10.0, "share": 0.46}  # 460 of 1000
    assert parts["step"] == {"us": 100.0, "share": 1.0}


@pytest.mark.parametrize(
    ("trace", "num_steps"),
    [
        (trace_of([10.0] * 20, launch="cudaLaunchKernel"), 0),
        (trace_of([10.0] * 3), 3),
        (Trace(), 0),
    ],
)
def test_a_profile_without_enough_recorded_steps_is_no_result(trace, num_steps):
    with pytest.raises(SystemExit, match=f"the profile has {num_steps} decode steps"):
        gpu_idle.gpu_figures(trace)


# what is printed


@pytest.mark.parametrize(("share", "verdict"), [(0.01, "reached (1.0%)"), (0.011, "missed (1.1%)")])
def test_a_table_says_whether_the_goal_is_reached(share, verdict):
    parts = {"step": {"us": 4100.0, "share": 1.0}, "idle between": {"us": 35.5, "share": share}}
    line = {"model": "llama8b", "batch": 64, "measured": "gpu", "steps": 34, "parts": parts}
    heading, step, idle, goal = gpu_idle.table(line)
    assert heading.split("  ")[0] == "llama8b, batch 64, profiled, median us"
    assert heading.endswith("share   (34 steps)")
    assert step.split() == ["step", "4100.000", "100.0%"]
    assert idle.split() == ["idle", "between", "35.500", f"{share:.1%}"]
    assert goal == f"goal: idle between at most 1% of a step: {verdict}"
    assert len(list(gpu_idle.table(line | {"batch": 65}))) == 3


# command line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--output-len", "1"], "--output-len must be from 2 to 3968"),
        (["--output-len", "3969"], "--output-len must be from 2 to 3968"),
        (["--batch", "64", "0"], "--batch and --repeats must be at least 1"),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(monkeypatch, capsys, argv, said):
    monkeypatch.setattr(sys, "argv", ["gpu_idle", "tiny", *argv])
    with pytest.raises(SystemExit):
        gpu_idle.main()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("room", "most"),
    [
        ({"max_running_requests": 1024, "max_total_num_tokens": 20000}, 52),
        ({"max_running_requests": 48, "max_total_num_tokens": 50000}, 48),
    ],
)
def test_a_batch_that_could_not_decode_together_is_refused(room, most):
    options = SimpleNamespace(batch=[16, 64], output_len=256)
    with pytest.raises(SystemExit, match=f"--batch 64 does not fit: at most {most} requests"):
        gpu_idle.check_room(options, room)
    options.batch = [most]
    gpu_idle.check_room(options, room)
