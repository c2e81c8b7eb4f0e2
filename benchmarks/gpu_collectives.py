"""Sums over GPUs with the norm that follows: ours through peer memory, and NCCL's with our norm.

    python -m benchmarks.gpu_collectives [--ranks 2]

Microseconds of one call among many recorded in a CUDA graph, for rows of 4096 bfloat16 numbers;
both are checked against a sum in float64 first. Then ours is called millions of times: no rank may
lose count of what it has exchanged, for then it waits for ever.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from sgl.kernels.collectives import TensorParallel
from sgl.kernels.peer_memory import MAX_WORD_ROWS

HIDDEN, CALLS, REPLAYS, SOAK_CALLS = 4096, 32, 10, 50_000
ROWS = (1, 8, 64, 256, 1024, 2048, 8192)


def microseconds(call: Callable[[], object]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(CALLS):
                call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(REPLAYS):
            dist.barrier()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return sorted(times)[REPLAYS // 2]


def check(tp: TensorParallel, device: torch.device) -> float:
    """Largest relative error of the norm of the sum."""
    worst = 0.0
    for T in (1, 5, 300, 1, 64, 1):
        part_TD = torch.randn(T, HIDDEN, device=device, dtype=torch.bfloat16)
        total_TD = part_TD.double()
        dist.all_reduce(total_TD)
        stream_TD = torch.zeros_like(part_TD)
        weight_D = torch.ones(HIDDEN, device=device)
        got_TD = tp.add_rms_norm(stream_TD, part_TD, weight_D, 1e-6).double()
        wanted_TD = total_TD * total_TD.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        worst = max(worst, float((got_TD - wanted_TD).norm() / wanted_TD.norm()))
    return worst


def soak(tp: TensorParallel, device: torch.device) -> bool:
    """Whether every row's count is that of its calls in the end, for few rows and for many."""
    assert tp.peers is not None
    is_right = True
    weight_D = torch.ones(HIDDEN, device=device)
    for T, counts_R in ((MAX_WORD_ROWS, tp.peers.word_counts_R), (300, tp.peers.counts_R)):
        part_TD = torch.zeros(T, HIDDEN, device=device, dtype=torch.bfloat16)
        stream_TD = torch.zeros_like(part_TD)
        expected_R = counts_R[:T] + SOAK_CALLS
        for _ in range(SOAK_CALLS):
            tp.add_rms_norm(stream_TD, part_TD, weight_D, 1e-6)
        is_right &= bool((counts_R[:T] == expected_R).all())
    return is_right


def rank_main(rank: int, size: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    plain = TensorParallel.join(rank, size, device=device, rendezvous=f"file://{folder}/store")
    ours = plain.with_peer_memory(device, max(ROWS), 2 * HIDDEN, check=True)
    assert ours.peers is not None, "the GPUs cannot reach each other"
    weight_D = torch.ones(HIDDEN, device=device)
    ways = {"peer memory": ours, "NCCL": replace(ours, peers=None)}
    for name, tp in ways.items():
        error = check(tp, device)
        if rank == 0:
            print(json.dumps({"check": name, "error": error, "ok": error < 1e-2}), flush=True)
    for T in ROWS:
        line: dict[str, float] = {"rows": T}
        for name, tp in ways.items():
            stream_TD = torch.randn(T, HIDDEN, device=device, dtype=torch.bfloat16)
            part_TD = torch.randn(T, HIDDEN, device=device, dtype=torch.bfloat16) * 1e-3
            us = microseconds(
                lambda t=tp, s=stream_TD, p=part_TD: t.add_rms_norm(s, p.clone(), weight_D, 1e-5)
            )
            line[name] = round(us, 2)
        if rank == 0:
            print(json.dumps(line), flush=True)
    is_right = soak(ours, device)
    if rank == 0:
        print(json.dumps({"check": "counts after a soak", "ok": is_right}), flush=True)
    ours.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.rank is not None:
        rank_main(options.rank, options.ranks, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_collectives"]
        command += ["--ranks", str(options.ranks), "--folder", folder]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], env=os.environ)
            for rank in range(options.ranks)
        ]
        sys.exit(max(rank.wait() for rank in ranks))


if __name__ == "__main__":
    main()
