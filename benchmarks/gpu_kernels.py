"""Our kernels one by one: microseconds, and share of the copy bandwidth or TFLOP/s.

    python -m benchmarks.gpu_kernels [gemv gemm residual decode extend small backends …]

Inputs take turns so that none is in the L2 cache; calls are recorded in a CUDA graph, so launches
cost what they cost in a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gpu_steps import copy_gbs
from sgl.execution.attention.choice import make_backend
from sgl.execution.kv_cache import KvCache
from sgl.execution.recorded_inputs import GraphShape, RecordedInputs
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import StepLayout
from sgl.kernels.multiprocessors import num_cores
from sgl.kernels.sampling_table import FREQUENCY, SamplingTable
from sgl.kernels.step_tokens import best_tokens
from sgl.kernels.triton_decode_attention import choose_tile, decode_attention, num_splits
from sgl.kernels.triton_extend_attention import RunPlanner, extend_attention
from sgl.kernels.triton_extend_attention import choose_tile as choose_extend_tile
from sgl.kernels.triton_gemv import Gemv, gemv
from sgl.kernels.triton_penalties import apply_penalties
from sgl.kernels.triton_rms_norm import add_rms_norm, rms_norm
from sgl.kernels.triton_sampling import sample_tokens
from sgl.kernels.triton_silu_and_mul import silu_and_mul
from sgl.models.batch import AttentionSpec

DEVICE = torch.device("cuda")
LINEARS = {
    "8b qkv": (6144, 4096),
    "8b o": (4096, 4096),
    "8b gate_up": (28672, 4096),
    "8b down": (4096, 14336),
    "8b head": (128256, 4096),
    "8b qkv of 2": (3072, 4096),  # of one of two ranks
    "8b o of 2": (4096, 2048),
    "8b gate_up of 2": (14336, 4096),
    "8b down of 2": (4096, 7168),
    "1b qkv": (3072, 2048),
    "1b o": (2048, 2048),
    "1b gate_up": (16384, 2048),
    "1b down": (2048, 8192),
    "1b head": (128256, 2048),
}


LARGE_LINEARS = ("8b qkv", "8b o", "8b gate_up", "8b down")


def microseconds(calls: list[Callable[[], object]], num_replays: int = 20) -> float:
    """Mean time of one of `calls`, which run one after the other in a graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(num_replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def turns(num_bytes: int) -> int:
    """How many inputs of this size do not fit in the cache together."""
    return max(2, min(64, 300_000_000 // max(num_bytes, 1) + 1))


def bench_gemv(gbs: float) -> Iterator[dict[str, object]]:
    for name, (O, I) in LINEARS.items():  # noqa: E741
        weights = [
            torch.randn(O, I, device=DEVICE, dtype=torch.bfloat16) for _ in range(turns(O * I * 2))
        ]
        x = torch.randn(1, I, device=DEVICE, dtype=torch.bfloat16)
        out = torch.empty(1, O, device=DEVICE, dtype=torch.bfloat16)
        floor = O * I * 2 / gbs / 1e3
        us = microseconds([lambda w=w: F.linear(x, w) for w in weights])
        yield {"kernel": "gemv", "shape": name, "how": "cublas", "us": us, "share": floor / us}
        best: list[tuple[float, tuple[int, int, int]]] = []
        for config in product((1, 2, 4, 8, 16), (256, 512, 1024, 2048), (2, 4, 8)):
            block_o, block_i, warps = config
            if not 1024 <= block_o * block_i <= 16384 or block_o * block_i // warps < 256:
                continue
            call = [lambda w=w: Gemv(config).run(x, w, out) for w in weights]
            best.append((microseconds(call, 7), config))
        best.sort()
        us = microseconds([lambda w=w: gemv(x, w, torch.bfloat16) for w in weights])
        yield {"kernel": "gemv", "shape": name, "how": "ours", "us": us, "share": floor / us,
               "best": [(round(us, 2), config) for us, config in best[:4]]}  # fmt: skip
        del weights
        torch.cuda.empty_cache()


def bench_decode(gbs: float) -> Iterator[dict[str, object]]:
    for B, length, (H, K, E) in product(
        (1, 16, 64, 256), (256, 1024, 8192), ((32, 8, 128), (32, 8, 64))
    ):
        if B * length > 600_000:
            continue
        num_slots = B * length
        num = turns(num_slots * K * E * 4)
        caches = [
            [torch.randn(num_slots, K, E, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(num)
        ]
        q = torch.randn(B, H, E, device=DEVICE, dtype=torch.bfloat16)
        pages = torch.randperm(num_slots, device=DEVICE).int().view(B, length)
        rows = torch.arange(B, device=DEVICE, dtype=torch.int32)
        positions = torch.full((B,), length - 1, device=DEVICE, dtype=torch.int32)
        out = torch.empty_like(q)
        floor = num_slots * K * E * 4 / gbs / 1e3
        for splits in sorted({1, 2, 4, 8, 16, 32} | {num_splits(B, K, num_cores(DEVICE))}):
            if B * K * splits > 8192 or B * K * splits < 64:
                continue
            us = microseconds(
                [
                    lambda k=k, v=v: decode_attention(
                        q, k, v, pages, rows, positions, out, page_size=1, scale=0.1,
                        splits=splits)
                    for k, v in caches
                ], 7)  # fmt: skip
            chosen = splits == num_splits(B, K, num_cores(DEVICE))
            yield {"kernel": "decode", "B": B, "len": length, "heads": (H, K, E), "splits": splits,
                   "chosen": chosen, "us": us, "share": floor / us}  # fmt: skip


def bench_extend(_: float) -> Iterator[dict[str, object]]:
    for (num, new, cached), (H, K, E) in product(
        ((4, 2048, 0), (16, 512, 0), (64, 128, 1024), (1, 8192, 0), (1, 256, 16128)),
        ((32, 8, 128), (32, 8, 64)),
    ):
        total = num * (new + cached)
        keys, values = (
            torch.randn(total, K, E, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
        )
        pages = torch.randperm(total, device=DEVICE).int().view(num, -1)
        q = torch.randn(num * new, H, E, device=DEVICE, dtype=torch.bfloat16)
        out = torch.empty_like(q)
        lens = np.arange(num), np.full(num, new), np.full(num, cached)

        def call(tile: tuple[int, int, int, int], num_programs: int) -> Callable[[], object]:
            planner = RunPlanner(tile[0] // (H // K), num_programs)
            plan = planner.plan(*lens)
            options = {"num_merges": planner.max_merges, "page_size": 1, "scale": 0.1, "tile": tile}
            if plan[: planner.max_merges].any():
                options["num_parts"] = num_programs
            args = (q, keys, values, pages, torch.from_numpy(plan).to(DEVICE), out)
            return lambda: extend_attention(*args, **({"num_parts": 0} | options))

        chosen, num_programs = choose_extend_tile(E, torch.bfloat16), num_cores(DEVICE) // K
        us = microseconds([call(chosen, num_programs)] * 3)
        swept = []
        for tile in product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
            try:
                taken = microseconds([call(tile, num_programs)] * 2, 5)
            except Exception:
                continue  # too large for the chip
            swept.append((round(taken, 1), tile))
        flops = 4 * num * new * (cached + new / 2) * H * E
        whole_us = microseconds([call(chosen, 1)] * 3)  # no run is divided
        yield {"kernel": "extend", "requests": num, "new": new, "cached": cached,
               "heads": (H, K, E), "us": us, "tflops": flops / us / 1e6, "whole_us": whole_us,
               "best": sorted(swept)[:4]}  # fmt: skip


def bench_small(gbs: float) -> Iterator[dict[str, object]]:
    for rows, hidden, ffn in product((1, 64, 8192), (2048, 4096), (14336,)):
        x, y = (torch.randn(rows, hidden, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        w = torch.ones(hidden, device=DEVICE)
        us = microseconds([lambda: add_rms_norm(x, y, w, 1e-5)] * 20)
        yield {"kernel": "add_rms_norm", "rows": rows, "size": hidden, "us": us,
               "share": rows * hidden * 8 / gbs / 1e3 / us}  # fmt: skip
        g = torch.randn(rows, 2 * ffn, device=DEVICE, dtype=torch.bfloat16)
        us = microseconds([lambda: silu_and_mul(g)] * 20)
        yield {"kernel": "silu_and_mul", "rows": rows, "size": ffn, "us": us,
               "share": rows * ffn * 6 / gbs / 1e3 / us}  # fmt: skip


def bench_decode_tiles(gbs: float) -> Iterator[dict[str, object]]:
    """Which tile suits the decode kernel."""
    for (B, length), (H, K, E) in product(
        ((64, 256), (64, 1024), (896, 640)), ((32, 8, 128), (32, 8, 64))
    ):
        num_slots = B * length
        caches = [
            [torch.randn(num_slots, K, E, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(turns(num_slots * K * E * 4))
        ]
        q = torch.randn(B, H, E, device=DEVICE, dtype=torch.bfloat16)
        pages = torch.randperm(num_slots, device=DEVICE).int().view(B, length)
        rows = torch.arange(B, device=DEVICE, dtype=torch.int32)
        positions = torch.full((B,), length - 1, device=DEVICE, dtype=torch.int32)
        out = torch.empty_like(q)
        splits = num_splits(B, K, num_cores(DEVICE))
        found = []
        for tile in product((32, 64, 128), (2, 4, 8), (2, 3, 4)):
            calls = [
                lambda k=k, v=v: decode_attention(
                    q,
                    k,
                    v,
                    pages,
                    rows,
                    positions,
                    out,
                    page_size=1,
                    scale=0.1,
                    splits=splits,
                    tile=tile,
                )
                for k, v in caches
            ]
            found.append((round(microseconds(calls, 7), 2), tile))
        floor = num_slots * K * E * 4 / gbs / 1e3
        yield {"kernel": "decode tiles", "B": B, "len": length, "heads": (H, K, E), "floor": floor,
               "splits": splits, "best": sorted(found)[:5],
               "ours": {t: us for us, t in found}[choose_tile(E, B, splits)]}  # fmt: skip


def bench_backends(gbs: float) -> Iterator[dict[str, object]]:
    """Steps of whole back ends, ours and flashinfer's where it is installed; planning apart."""
    names = ["triton", *(["flashinfer"] if find_spec("flashinfer") else [])]
    for (B, new, length), name in product(((64, 1, 1024), (256, 1, 1024), (4, 2048, 2048)), names):
        spec = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, scale=128**-0.5)
        kv_bytes = B * length * spec.num_kv_heads * spec.head_dim * 4
        layers = [spec] * turns(kv_bytes)
        cache = KvCache(layers, B * length, 1, dtype=torch.bfloat16, device=DEVICE)
        for tensor in (*cache.keys_SKE, *cache.values_SKE):
            tensor.normal_()
        table = RequestTable(B, length, 100, DEVICE)
        table.pages_RP[:B] = np.random.default_rng(0).permutation(B * length).reshape(B, -1)
        table.device_pages_RP.copy_(torch.from_numpy(table.pages_RP))
        lens = np.full(B, length)
        layout = StepLayout(np.arange(B), np.full(B, new), lens, B if new == 1 else 0)
        inputs = np.zeros((4, B * new), np.int32)
        inputs[:2] = np.repeat(layout.rows_B, new), layout.positions()
        inputs_4T = table.to_device(inputs)
        attention = make_backend(name, layers, cache)
        plan_us = host_microseconds(lambda: attention.plan(layout, table, inputs_4T))
        q = torch.randn(B * new, spec.num_heads, spec.head_dim, device=DEVICE, dtype=torch.bfloat16)
        us = microseconds([lambda i=i: attention.run(i, q) for i in range(len(layers))])
        line = {"kernel": "backend", "how": type(attention).__name__, "requests": B, "new": new,
                "len": length, "us": us, "plan_us": plan_us}  # fmt: skip
        if new > 1:
            flops = 4 * B * new * (length - new / 2) * spec.num_heads * spec.head_dim
            yield {**line, "tflops": flops / us / 1e6}
            continue
        shape = GraphShape(B, B)
        recorded = RecordedInputs(shape, table, 0)
        recorded.fill(inputs, layout, np.arange(B), np.zeros((0, 8), np.int32))
        for variant in reversed(range(attention.num_variants(shape))):
            attention.plan_recorded(table, recorded, variant)
        replan_us = host_microseconds(lambda: attention.choose_variant(layout, table, shape))
        recorded_us = microseconds([lambda i=i: attention.run(i, q) for i in range(len(layers))])
        yield {**line, "share": kv_bytes / gbs / 1e3 / us, "recorded_us": recorded_us,
               "replan_us": replan_us}  # fmt: skip


def host_microseconds(call: Callable[[], object], num: int = 20) -> float:
    """Median time until `call` returns, with the device idle."""
    times = []
    for _ in range(num):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times)


VOCAB = 128256
# temperature, top-k, top-p, min-p
SAMPLINGS = {
    "greedy": (1.0, 1, 1.0, 0.0),
    "unlimited": (1.0, VOCAB, 1.0, 0.0),
    "top-k 50, top-p 0.9": (1.0, 50, 0.9, 0.0),
    "top-p 0.9": (1.0, VOCAB, 0.9, 0.0),
    "min-p 0.05": (1.0, VOCAB, 1.0, 0.05),
}


def bench_sampling(gbs: float) -> Iterator[dict[str, object]]:
    """`share` is of reading the logits once; torch's own maximum and sort beside it."""
    for B, (name, spread) in product((1, 64, 256), (("peaked", 4.0), ("flat", 0.01))):
        size = B * VOCAB * 4
        inputs = [torch.randn(B, VOCAB, device=DEVICE) * spread for _ in range(turns(size))]
        rows = torch.arange(B, device=DEVICE, dtype=torch.int32)
        last = torch.zeros(B, dtype=torch.int64, device=DEVICE)
        floor = size / gbs / 1e3
        us = microseconds([lambda x=x: best_tokens(x, rows, last) for x in inputs])
        yield {"kernel": "sampling", "rows": B, "logits": name, "how": "best_tokens", "us": us,
               "share": floor / us}  # fmt: skip
        us = microseconds([lambda x=x: x.sort(dim=-1, descending=True) for x in inputs[:4]], 5)
        yield {"kernel": "sampling", "rows": B, "logits": name, "how": "torch.sort", "us": us,
               "share": floor / us}  # fmt: skip
        for how, numbers in SAMPLINGS.items():
            table = SamplingTable.greedy(B, DEVICE)
            table.numbers_RN[:, : len(numbers)] = torch.tensor(numbers, device=DEVICE)
            table.seed_R.copy_(rows)
            us = microseconds([lambda x=x: sample_tokens(x, rows, rows, table, last)
                               for x in inputs])  # fmt: skip
            yield {"kernel": "sampling", "rows": B, "logits": name, "how": how, "us": us,
                   "gbs": size / us / 1e3, "share": floor / us}  # fmt: skip
        del inputs
        torch.cuda.empty_cache()


def bench_penalties(gbs: float) -> Iterator[dict[str, object]]:
    """Logits, counts and prompt flags are read; one token in a hundred is written."""
    for B, penalty in product((1, 64, 256), (0.0, 0.5)):
        counts = (torch.rand(B, VOCAB, device=DEVICE) < 0.01).int()
        in_prompt = torch.zeros(B, VOCAB, dtype=torch.bool, device=DEVICE)
        rows = torch.arange(B, device=DEVICE, dtype=torch.int32)
        size = B * VOCAB * 9 if penalty else 0  # rows without one are not read
        logits = [torch.randn(B, VOCAB, device=DEVICE) for _ in range(turns(B * VOCAB * 9))]
        table = SamplingTable.greedy(B, DEVICE)
        table.numbers_RN[:, FREQUENCY] = penalty
        us = microseconds([lambda x=x: apply_penalties(x, rows, table, counts, in_prompt)
                           for x in logits])  # fmt: skip
        yield {"kernel": "penalties", "rows": B, "frequency": penalty, "us": us,
               "gbs": size / us / 1e3, "share": size / gbs / 1e3 / us}  # fmt: skip
        del logits
        torch.cuda.empty_cache()


def bench_gemm(gbs: float) -> Iterator[dict[str, object]]:
    """Matrix products of many rows, with the weight as it is stored and transposed.

    The ways take turns, each for long enough that the device's power limit counts.
    """
    shapes = {name: shape for name, shape in LINEARS.items() if name in LARGE_LINEARS}
    for M, (name, (O, I)) in product((896, 8192), shapes.items()):  # noqa: E741
        weights = [torch.randn(O, I, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
        x = torch.randn(M, I, device=DEVICE, dtype=torch.bfloat16)
        layouts = {
            "rows": [w.t() for w in weights],
            "columns": [w.t().contiguous() for w in weights],
        }
        ways = list(product(("cublas", "cublaslt"), layouts))
        found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for _ in range(3):
            for library, layout in ways:
                torch.backends.cuda.preferred_blas_library(library)
                calls = [lambda w=w: torch.mm(x, w) for w in layouts[layout]]
                num_replays = int(0.3 / (2 * 4 * M * O * I / 700e12))
                found[library, layout].append(microseconds(calls, num_replays))
        for (library, layout), times in found.items():
            us = statistics.median(times)
            yield {"kernel": "gemm", "M": M, "shape": name, "library": library, "weight": layout,
                   "us": us, "tflops": 2 * M * O * I / us / 1e6}  # fmt: skip
    torch.backends.cuda.preferred_blas_library("default")


def bench_residual(_: float) -> Iterator[dict[str, object]]:
    """A product, its addition to the residual stream and the norm: in which kernel it is added.

    The ways take turns, each for long enough that the device's power limit counts.
    """
    D = 4096
    norm_D = torch.ones(D, device=DEVICE)
    for T, I in product((64, 256, 896, 2048, 8192), (4096, 14336)):  # noqa: E741
        weights = [torch.randn(D, I, device=DEVICE, dtype=torch.bfloat16) * 0.01 for _ in range(4)]
        x = torch.randn(T, I, device=DEVICE, dtype=torch.bfloat16)
        stream = torch.zeros(T, D, device=DEVICE, dtype=torch.bfloat16)
        ways: dict[str, list[Callable[[], object]]] = {
            "by the norm": [
                lambda w=w: add_rms_norm(stream, torch.mm(x, w.t()), norm_D, 1e-5) for w in weights
            ],
            "by the product": [
                lambda w=w: rms_norm(stream.addmm_(x, w.t()), norm_D, 1e-5) for w in weights
            ],
        }
        found: dict[str, list[float]] = defaultdict(list)
        num_replays = int(0.3 / (2 * 4 * T * I * D / 600e12 + 1e-4))
        for way, calls in list(ways.items()) * 3:
            found[way].append(microseconds(calls, num_replays))
        yield {"kernel": "residual", "rows": T, "inputs": I,
               **{way: statistics.median(times) for way, times in found.items()}}  # fmt: skip


BENCHES = {
    "residual": bench_residual,
    "gemm": bench_gemm,
    "backends": bench_backends,
    "decode_tiles": bench_decode_tiles,
    "gemv": bench_gemv,
    "decode": bench_decode,
    "extend": bench_extend,
    "small": bench_small,
    "sampling": bench_sampling,
    "penalties": bench_penalties,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", default=list(BENCHES))
    options = parser.parse_args()
    gbs = copy_gbs(DEVICE)
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_gbs": gbs,
                      "torch": torch.__version__}))  # fmt: skip
    for name in options.kernels:
        for line in BENCHES[name](gbs):
            rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}
            print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    main()
