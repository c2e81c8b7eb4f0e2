"""One rank of a test group: python tensor_parallel_rank.py RANK FOLDER.

Runs the models in FOLDER with 3 ranks, then with 2 of them; rank 0 writes the logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import CPU, loaded, sequence_logits

from sgl.kernels.collectives import TensorParallel

TOKEN_IDS = [5, 99, 0, 5, 42, 17, 64, 63]


def run(rank: int, size: int, folder: Path) -> dict[str, torch.Tensor]:
    """Logits of each model, and what the collectives gave."""
    rendezvous = f"file://{folder}/store{size}"
    tp = TensorParallel.join(rank, size, device=CPU, rendezvous=rendezvous, timeout_s=60.0)
    models = sorted(path for path in folder.iterdir() if (path / "config.json").is_file())
    found = {}
    for path in models:
        found[f"{path.name}/{size}"] = sequence_logits(loaded(path, tp), TOKEN_IDS, tp)
    half = torch.full((2, 3), rank + 1.0, dtype=torch.bfloat16)
    found[f"all_reduce/{size}"] = tp.all_reduce(half)
    found[f"broadcast/{size}"] = tp.broadcast(torch.tensor([rank + 7]), src=size - 1)
    found[f"gather/{size}"] = tp.all_gather_last(torch.full((2, 1), float(rank)))
    tp.leave()
    return found


def main() -> None:
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    found = run(rank, 3, folder)
    if rank < 2:
        found |= run(rank, 2, folder)
    save_file(found, folder / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main()
