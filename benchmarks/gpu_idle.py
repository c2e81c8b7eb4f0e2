"""How long a GPU idles between decode steps, and what CPU time a step takes in each process.

    python -m benchmarks.gpu_idle llama8b --batch 64 --out results.jsonl
    python -m benchmarks.gpu_idle llama1b --batch 64 256 --out results.jsonl --device "NVIDIA H200"

`sgl.Engine` on dummy weights, as in peers.py; all requests of a batch come at once.

    cpu   without a profile: answers of many tokens less answers of one are the decode phase; its
          steps, their time, and the CPU time of every process in it
    gpu   a profile of steps, from when all prompts are computed: what the device did (gpu_gaps.py)

CPU time is that of all threads of a process, and includes polling for what is due soon. `caller` is
this process, which holds the engine's front; in a server that is the ingress. Where the prompts
take many steps, as on a CPU, requests begin and end one after the other, and the decode phase holds
steps of smaller batches too: a larger chunked_prefill_size among the --options avoids that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.cpu_time import Spent, cpu_seconds, engine_processes
from benchmarks.peers import CONTEXT_LEN, Sgl
from benchmarks.shapes import SHAPES, write_model
from benchmarks.workloads import Work
from scripts.gpu_gaps import BusyTime, Trace, read_events, steps_of
from sgl.hardware import choose_device, package_version

INPUT_LEN = 128
MAX_REQUESTS = 1024  # at a time: the default on a GPU, for a CPU too
POLL_S = 0.001
PROFILED_STEPS = 40
UNSETTLED_STEPS = 5  # the first of a profile do not count: its start may slow them down

GPU_PARTS = ("step", "idle between", "idle inside")
TITLES = {"cpu": "CPU, ms a step", "gpu": "profiled, median us"}
GOALS = {  # shape, batch, what is measured -> largest share of a step that something is to have
    ("llama8b", 64, "gpu"): {"idle between": 0.01},
    ("llama1b", 64, "gpu"): {"idle between": 0.04},
    ("llama1b", 256, "cpu"): {"scheduler": 0.25},
}


def spent_on(peer: Sgl, processes: dict[str, int], works: Sequence[Work]) -> Spent:
    """Several runs between two looks, so that ticks are rounded twice only."""
    before = _look(peer, processes)
    for work in works:
        assert peer.generate(work) == work.output_lens, "an answer has the wrong length"
    return _look(peer, processes) - before


def _look(peer: Sgl, processes: dict[str, int]) -> Spent:
    num_steps = int(peer.engine.get_server_info()["num_steps"])
    cpu_s = {name: cpu_seconds(pid) for name, pid in processes.items()}
    return Spent(num_steps, time.perf_counter(), cpu_s)


def cpu_figures(decode: Spent) -> dict[str, Any]:
    step_ms = decode.wall_s / decode.num_steps * 1e3
    parts = {"step": _part("ms", step_ms, 1.0)}
    for name, seconds in decode.cpu_s.items():
        parts[name] = _part("ms", seconds / decode.num_steps * 1e3, seconds / decode.wall_s)
    return {"steps": decode.num_steps, "parts": parts}


def profile_decodes(peer: Sgl, work: Work, folder: Path) -> Path:
    """The trace of some steps of `work` that hold no prompts."""
    num_before = _num_prompt_tokens(peer)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(peer.generate, work)
        while _num_prompt_tokens(peer) < num_before + work.num_input and not answers.done():
            time.sleep(POLL_S)
        peer.engine.start_profile(folder, PROFILED_STEPS)  # keeps its place behind the prompts
        answers.result()
    peer.engine.stop_profile()
    [path] = folder.glob("rank0-*")
    return path


def _num_prompt_tokens(peer: Sgl) -> int:
    """Prompt tokens of all steps planned so far, and those that were found in the cache."""
    info = peer.engine.get_server_info()
    return int(info["num_prefill_tokens"] + info["num_cached_tokens"])


def gpu_figures(trace: Trace) -> dict[str, Any]:
    """Medians, and shares of the whole time, of the recorded steps that another one follows."""
    steps = [
        (step.time, step.between, step.inside)  # GPU_PARTS
        for step in steps_of(trace, BusyTime(trace.work))
        if step.is_recorded and step.between is not None
    ]
    settled = steps[UNSETTLED_STEPS:]
    if not settled:
        raise SystemExit(
            f"the profile has {len(steps)} decode steps that ran as recorded graphs, too few to "
            "tell: ask for longer answers with --output-len, and leave CUDA graphs on"
        )
    parts, total = {}, sum(time for time, _, _ in settled)
    for name, times in zip(GPU_PARTS, zip(*settled, strict=True), strict=True):
        parts[name] = _part("us", statistics.median(times), sum(times) / total)
    return {"steps": len(settled), "parts": parts}


def _part(unit: str, length: float, share: float) -> dict[str, float]:
    return {unit: round(length, 4) + 0.0, "share": round(share, 4) + 0.0}  # + 0.0: -0.0 is 0.0


def measure(peer: Sgl, options: argparse.Namespace, has_gpu: bool) -> Iterator[dict[str, Any]]:
    """A line per batch size and kind. Profiles come last: they may slow down what follows."""
    processes, seeds = engine_processes(os.getpid()), itertools.count(700)
    ids = workloads.IDS[0], min(workloads.IDS[1], SHAPES[options.model]["vocab_size"])

    def work(batch: int, num_out: int) -> Work:
        return workloads.equal(next(seeds), batch, INPUT_LEN, num_out, ids)

    for batch in options.batch:
        peer.generate(work(batch, 32))
        first, whole = (
            spent_on(peer, processes, [work(batch, num_out) for _ in range(options.repeats)])
            for num_out in (1, options.output_len)
        )
        yield {"measured": "cpu", "batch": batch, **cpu_figures(whole - first)}
    for batch in options.batch if has_gpu else []:
        with tempfile.TemporaryDirectory() as folder:
            path = profile_decodes(peer, work(batch, options.output_len), Path(folder))
            figures = gpu_figures(Trace.of(read_events(path)))
        yield {"measured": "gpu", "batch": batch, **figures}


def table(line: dict[str, Any]) -> Iterator[str]:
    """What a result looks like to a reader."""
    model, measured, batch, parts = (line[key] for key in ("model", "measured", "batch", "parts"))
    title = f"{model}, batch {batch}, {TITLES[measured]}"
    yield f"{title:48}{'share':>9}   ({line['steps']} steps)"
    for name, part in parts.items():
        length, share = part.values()
        yield f"{name:36}{length:12.3f}{share:9.1%}"
    for name, most in GOALS.get((model, batch, measured), {}).items():
        share = parts[name]["share"]
        verdict = "reached" if share <= most else "missed"
        yield f"goal: {name} at most {most:.0%} of a step: {verdict} ({share:.1%})"


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(options.model, Path(folder))
        flags = {"max_running_requests": MAX_REQUESTS} | options.options
        peer = Sgl(str(model), flags)
        info = peer.engine.get_server_info()
        check_room(options, info)
        devices = {key: info[key] for key in ("tp_size", "base_gpu_id")}
        has_gpu = choose_device(info["device"], **devices) == "cuda"
        stamp = {
            "engine": " ".join(["sgl", *(f"{k}={v}" for k, v in sorted(options.options.items()))]),
            "version": peer.version,
            "model": options.model,
            "device": options.device,
            "torch": package_version("torch"),
            "output_len": options.output_len,
        }
        for found in measure(peer, options, has_gpu):
            line = stamp | found
            print("\n".join(table(line)), flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        if not has_gpu:
            print("The idle time of a GPU was left out: that needs one, and this ran on the CPU.")
        peer.engine.shutdown()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--output-len", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="runs without a profile")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, for the engine")
    parser.add_argument("--device", default="", help="what it runs on, for the record")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not 2 <= options.output_len <= CONTEXT_LEN - INPUT_LEN:
        parser.error(f"--output-len must be from 2 to {CONTEXT_LEN - INPUT_LEN}")
    if min(*options.batch, options.repeats) < 1:
        parser.error("--batch and --repeats must be at least 1")
    return options


def check_room(options: argparse.Namespace, info: dict[str, Any]) -> None:
    """All requests of a batch are to decode at the same time."""
    most = min(
        info["max_running_requests"],
        info["max_total_num_tokens"] // (INPUT_LEN + options.output_len),
    )
    if max(options.batch) > most:
        raise SystemExit(
            f"--batch {max(options.batch)} does not fit: at most {most} requests of {INPUT_LEN} + "
            f"{options.output_len} tokens run at the same time here; choose less"
        )


if __name__ == "__main__":
    main()
