"""Sums over GPUs with the norm that follows: ours through peer memory, and NCCL's with our norm.

    python -m benchmarks.gpu_collectives [--ranks 2]

Microseconds of one call among many recorded in a CUDA graph, for rows of 4096 bfloat16 numbers;
both are checked against a sum in float64 first. Of one row the product before the sum, too: alone, with
the sum, and with a sum of which the product itself sends the parts. Then ours is called millions of
times: no rank may lose count of what it has exchanged, for then it waits for ever.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle

import torch
import torch.distributed as dist
from torch import Tensor

from sgl.kernels.collectives import TensorParallel
from sgl.kernels.peer_memory import MAX_WORD_ROWS, SentPart
from sgl.kernels.triton_gemv import gemv, sent_gemv

PRODUCTS = {"8b o": 2048, "8b down": 7168}  # inputs of one of two ranks
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


def products(tp: TensorParallel, device: torch.device) -> Iterator[dict[str, object]]:
    """Microseconds of a product of one row, and the sum of it over ranks, checked."""
    assert tp.peers is not None
    peers = tp.peers
    weight_D = torch.ones(HIDDEN, device=device)
    stream_1D = torch.zeros(1, HIDDEN, device=device, dtype=torch.bfloat16)
    for name, num_in in PRODUCTS.items():
        weights = cycle([random_matrix(HIDDEN, num_in, device) for _ in range(16)])
        x_1I = random_matrix(1, num_in, device)

        def sent(x_1I: Tensor = x_1I, weights: Iterator[Tensor] = weights) -> Tensor:
            part = SentPart(sent_gemv(x_1I, next(weights), peers))
            return tp.add_rms_norm(stream_1D, part, weight_D, 1e-5)

        def apart(x_1I: Tensor = x_1I, weights: Iterator[Tensor] = weights) -> Tensor:
            part_1D = gemv(x_1I, next(weights), torch.bfloat16)
            return tp.add_rms_norm(stream_1D, part_1D, weight_D, 1e-5)

        weight_DI = random_matrix(HIDDEN, num_in, device)
        total_1D = x_1I.double() @ weight_DI.double().t()
        dist.all_reduce(total_1D)
        summed_1D = torch.zeros_like(stream_1D)
        part = SentPart(sent_gemv(x_1I, weight_DI, peers))
        tp.add_rms_norm(summed_1D, part, weight_D, 1e-5)
        error = float((summed_1D.double() - total_1D).norm() / total_1D.norm())
        yield {
            "product": name,
            "error": error,
            "ok": error < 1e-2,
            "alone": round(
                microseconds(lambda x=x_1I, w=weights: gemv(x, next(w), torch.bfloat16)), 2
            ),
            "then the sum": round(microseconds(apart), 2),
            "sent by it": round(microseconds(sent), 2),
        }


def random_matrix(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02


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
    x_1I, weight_DI = random_matrix(1, 2048, device), random_matrix(HIDDEN, 2048, device)
    stream_1D = torch.zeros(1, HIDDEN, device=device, dtype=torch.bfloat16)
    expected_R = tp.peers.word_counts_R[:1] + SOAK_CALLS
    for _ in range(SOAK_CALLS):
        part = SentPart(sent_gemv(x_1I, weight_DI, tp.peers))
        tp.add_rms_norm(stream_1D, part, weight_D, 1e-6)
    return is_right and bool((tp.peers.word_counts_R[:1] == expected_R).all())


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
    for found in products(ours, device):
        if rank == 0:
            print(json.dumps(found), flush=True)
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
