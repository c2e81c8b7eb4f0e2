"""Steps of the worker alone, without processes: how long, and in which kernels.

    python -m benchmarks.gpu_steps llama8b llama1b [--backend triton] [--batches 1 64 256]

For each model: decode steps at each batch size (milliseconds a step on the device, share of the
memory roofline, milliseconds of the host), one prefill step, and the kernels of each by time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.shapes import weight_bytes, write_model
from sgl.execution.attention.choice import is_recordable, make_backend
from sgl.execution.kv_cache import KvCache
from sgl.execution.recorded_inputs import GraphShape
from sgl.execution.request_table import RequestTable
from sgl.execution.runner import Runner
from sgl.execution.step_graphs import StepGraphs
from sgl.kernels.collectives import TensorParallel
from sgl.messages import Chunk, NewRow, StepPlan, pack
from sgl.models.loader import load_model
from sgl.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class Bench:
    """A runner whose requests take the next free page for every token."""

    def __init__(self, model: str, backend: str, max_rows: int, num_pages: int, graphs: bool):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with tempfile.TemporaryDirectory() as folder:
            path = write_model(model, Path(folder))
            network, config = load_model(
                str(path),
                load_format="dummy",
                dtype="bfloat16",
                device=device,
                tp=TensorParallel(),
                overrides={},
            )
        self.device = device
        cache = KvCache(network.attention_layers, num_pages, 1, dtype=torch.bfloat16, device=device)
        table = RequestTable(max_rows, 8192, config.vocab_size, device)
        attention = make_backend(backend, network.attention_layers, cache)
        recorded = None
        if graphs and is_recordable(attention) and device.type == "cuda":
            shapes = [GraphShape(size, size) for size in sorted({1, 64, max_rows})]
            recorded = StepGraphs(network, table, attention, TensorParallel(), shapes)
            recorded.record()
        self.runner = Runner(network, table, attention, TensorParallel(), recorded)
        self.vocab_size = config.vocab_size
        self.rng = np.random.default_rng(0)
        self.num_pages = num_pages
        self.next_page = self.num_steps = 0

    def pages(self, num: int) -> bytes:
        pages = (np.arange(num) + self.next_page) % self.num_pages
        self.next_page += num
        return pages.astype(np.int32).tobytes()

    def prefill(self, first_row: int, num_rows: int, length: int) -> Any:
        chunks, admitted = [], []
        for row in range(first_row, first_row + num_rows):
            ids = self.rng.integers(0, self.vocab_size, length, dtype=np.int32)
            admitted.append(NewRow(row, 0, b"", GREEDY, seed=row))
            chunks.append(Chunk(row, 0, ids.tobytes(), self.pages(length), True))
        return self._run(StepPlan(self.num_steps, b"", admitted, b"", chunks=chunks))

    def decode(self, num_rows: int) -> Any:
        rows = pack(range(num_rows))
        return self._run(StepPlan(self.num_steps, decode_rows=rows, page_ids=self.pages(num_rows)))

    def _run(self, plan: StepPlan) -> Any:
        self.num_steps += 1
        return self.runner.run(plan)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def time_decode(bench: Bench, batch: int, num_steps: int) -> dict[str, float]:
    outputs, host = [], []
    for _ in range(5):
        bench.decode(batch)
    bench.sync()
    started = time.perf_counter()
    for _ in range(num_steps):
        begun = time.perf_counter()
        outputs.append(bench.decode(batch))
        host.append(time.perf_counter() - begun)
        if len(outputs) > 2:
            outputs.pop(0).wait()
    bench.sync()
    seconds = (time.perf_counter() - started) / num_steps
    return {"ms": seconds * 1e3, "host_ms": statistics.median(host) * 1e3}


def kernels(bench: Bench, run: Any, num: int) -> list[tuple[str, float, float]]:
    """Name, microseconds and count a step of the kernels, longest first."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        for _ in range(num):
            run()
        bench.sync()
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name[:70]][0] += event.time_range.elapsed_us()
            spent[event.name[:70]][1] += 1
    rows = [(name, us / num, count / num) for name, (us, count) in spent.items()]
    return sorted(rows, key=lambda row: -row[1])


def copy_gbs(device: torch.device) -> float:
    """Device-to-device copy, bytes read plus bytes written, median of ten."""
    a = torch.empty(2 << 30, dtype=torch.uint8, device=device).random_(0, 255)
    b, rates = torch.empty_like(a), []
    for _ in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        b.copy_(a)
        end.record()
        torch.cuda.synchronize()
        rates.append(2 * a.numel() / begin.elapsed_time(end) / 1e6)
    return statistics.median(rates[3:])


def show(title: str, rows: list[tuple[str, float, float]]) -> None:
    total = sum(us for _, us, _ in rows)
    print(f"-- {title}: {total:.0f} us in kernels", flush=True)
    for name, us, count in rows[:14]:
        print(f"   {us:9.1f} us {count:6.1f} x {us / max(count, 1e-9):8.2f}  {name}")


def measure(model: str, options: argparse.Namespace, gbs: float) -> list[dict[str, Any]]:
    max_rows = max(options.batches)
    bench = Bench(model, options.backend, max_rows, options.pages, not options.no_graphs)
    found = []
    floor_ms = weight_bytes(model) / gbs / 1e6
    length = options.length
    per_step = max(1, 8192 // length)
    for first in range(0, max_rows, per_step):
        bench.prefill(first, min(per_step, max_rows - first), length)
    bench.sync()
    for batch in options.batches:
        timed = [time_decode(bench, batch, options.steps) for _ in range(3)]
        best = sorted(timed, key=lambda one: one["ms"])[1]
        share = floor_ms / best["ms"]
        found.append(
            {"model": model, "what": "decode", "batch": batch, "kv_len": length,
             "backend": options.backend, "floor_ms": floor_ms, "share": share, **best}
        )  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
        if bench.device.type == "cuda":
            show(f"{model} decode {batch}", kernels(bench, lambda b=batch: bench.decode(b), 3))
    for _ in range(2):
        bench.prefill(0, min(per_step, max_rows), length)
    bench.sync()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        bench.prefill(0, min(per_step, max_rows), length)
        bench.sync()
        seconds.append(time.perf_counter() - started)
    num = min(per_step, max_rows) * length
    found.append(
        {"model": model, "what": "prefill", "tokens": num, "ms": statistics.median(seconds) * 1e3,
         "backend": options.backend}
    )  # fmt: skip
    print(json.dumps(found[-1]), flush=True)
    if bench.device.type == "cuda":
        run = lambda: bench.prefill(0, min(per_step, max_rows), length)  # noqa: E731
        show(f"{model} prefill {num}", kernels(bench, run, 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pages", type=int, default=400_000)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    gbs = 0.0
    lines: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        gbs = copy_gbs(torch.device("cuda"))
        lines.append({"device": torch.cuda.get_device_name(), "copy_gbs": gbs,
                      "torch": torch.__version__})  # fmt: skip
        print(json.dumps(lines[0]))
    for model in options.models:
        lines += measure(model, options, gbs or 1.0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if options.out:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
