"""The report on a profile's gaps, for a trace whose times are known."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "scripts" / "gpu_gaps.py"


@pytest.fixture(scope="module")
def gpu_gaps():
    spec = importlib.util.spec_from_file_location("gpu_gaps", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their own types up
    spec.loader.exec_module(module)
    return module


def event(category, name, start, end, correlation=None, **fields):
    args = {} if correlation is None else {"correlation": correlation}
    return {
        "ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "args": args
    } | fields  # fmt: skip


# step 1 launches kernel by kernel, on two streams; steps 2 and 3 are recorded graphs
EVENTS = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    event("user_annotation", "warm-up", 0, 5),
    event("kernel", "of nobody", 1, 3, 99),
    event("user_annotation", "step 1", 10, 60),
    event("gpu_user_annotation", "step 1", 20, 90),
    event("cpu_op", "aten::linear", 12, 40),
    event("cpu_op", "aten::mm", 14, 30),
    event("cuda_runtime", "cudaLaunchKernel", 15, 18, 1),
    event("cuda_driver", "cuLaunchKernelEx", 35, 36, 2),
    event("cuda_runtime", "cudaMemcpyAsync", 55, 58, 3),
    event("kernel", "gemm", 20, 40, 1),
    event("kernel", "norm", 38, 50, 2),
    event("gpu_memcpy", "Memcpy DtoH", 60, 64, 3),
    event("user_annotation", "step 2", 62, 70),
    event("cuda_runtime", "cudaGraphLaunch", 63, 66, 4),
    event("kernel", "gemm", 70, 90, 4),
    event("kernel", "norm", 91, 95, 4),
    event("user_annotation", "step 3", 110, 120),
    event("cpu_op", "aten::copy_", 111, 113),
    event("cuda_runtime", "cudaGraphLaunch", 112, 113, 5),
    event("kernel", "gemm", 115, 135, 5),
    event("kernel", "norm", 136, 140, 5),
]


def test_steps_are_told_by_the_launches_inside_their_annotations(gpu_gaps):
    trace = gpu_gaps.Trace.of(EVENTS)
    steps = gpu_gaps.steps_of(trace, gpu_gaps.BusyTime(trace.work))
    found = [(s.name, s.is_recorded, s.begin, s.time, s.inside, s.between) for s in steps]
    assert found == [
        ("step 1", False, 20, 50, 10, 6),  # idle from 50 to 60, then until 70
        ("step 2", True, 70, 45, 1, 20),
        ("step 3", True, 115, 25, 1, None),
    ]
    assert [step.busy for step in steps] == [34, 24, 24]


def test_work_at_the_same_time_counts_once(gpu_gaps):
    spans = [(0, 10), (2, 5), (9, 12), (20, 21), (21, 30)]
    busy = gpu_gaps.BusyTime([gpu_gaps.Span("k", *span) for span in spans])
    assert busy.intervals == [(0, 12), (20, 30)]
    assert busy.gaps() == [(12, 20)]
    assert [busy.idle(-5, 0), busy.idle(0, 12), busy.idle(10, 25), busy.idle(30, 34)] == [
        5,
        0,
        8,
        4,
    ]


def test_long_gaps_name_what_is_around_them(gpu_gaps):
    trace = gpu_gaps.Trace.of(EVENTS)
    busy = gpu_gaps.BusyTime(trace.work)
    gaps = gpu_gaps.longest_gaps(trace, busy, gpu_gaps.steps_of(trace, busy), most=4)
    found = [(g.time, g.where, g.before, g.after, g.operator, g.lateness) for g in gaps]
    assert found == [
        (20, "step 2 | step 3", "norm", "gemm", "aten::copy_", 17),
        (17, "before the first step", "of nobody", "gemm", "aten::mm", 12),
        (10, "step 1", "norm", "Memcpy DtoH", "cudaMemcpyAsync", 5),
        (6, "step 1 | step 2", "Memcpy DtoH", "gemm", "cudaGraphLaunch", -1),
    ]


def test_percentiles(gpu_gaps):
    assert gpu_gaps.percentile(range(1, 201), 99) == 198
    assert gpu_gaps.percentile([7], 99) == 7


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_the_command_prints_the_tables(tmp_path, suffix):
    path = tmp_path / f"rank0.trace{suffix}"
    opened = gzip.open if suffix.endswith("gz") else open
    with opened(path, "wt") as file:
        json.dump({"traceEvents": EVENTS}, file)
    done = subprocess.run([sys.executable, PATH, path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["recorded", "steps,", "us", "median", "p99", "share", "(2", "steps)"] in rows
    assert ["step", "35.0", "45.0", "100.0%"] in rows
    assert ["idle", "before", "next", "20.0", "20.0", "28.6%"] in rows
    assert ["gemm", "0.06", "69.8%", "3", "20.00"] in rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"traceEvents": EVENTS[:2]}, "nothing ran on a GPU"),
        ({"traceEvents": EVENTS[1:3]}, "no work belongs to an annotation"),
        ([], "this is not a trace"),
    ],
)
def test_a_trace_without_gpu_work_or_steps_is_refused(tmp_path, content, reason):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(content))
    done = subprocess.run([sys.executable, PATH, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
