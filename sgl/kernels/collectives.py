"""The tensor-parallel group: what the ranks of one model exchange; one alone exchanges nothing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the `size` ranks that hold one model together.

    Every rank must make the same calls in the same order.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def join(
        cls,
        rank: int,
        size: int,
        *,
        device: torch.device,
        rendezvous: str,
        timeout_s: float = 600.0,
    ) -> TensorParallel:
        """Meet the other ranks at `rendezvous`, for instance "file:///a/private/folder/store".

        Blocks until all are there. NCCL where `device` is a GPU, gloo on the CPU.
        """
        if size == 1:
            return cls()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        return cls(rank, size, dist.group.WORLD)

    def leave(self) -> None:
        """End the group; nothing may be exchanged afterwards."""
        if self.size > 1:
            dist.destroy_process_group(self.group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, written into `x`."""
        if self.size == 1:
            return x
        if x.device.type == "cpu" and x.dtype != torch.float32:
            # gloo adds in the type it is given: sums in 16 bits would lose what a GPU keeps
            wide = x.float()
            dist.all_reduce(wide, group=self.group)
            return x.copy_(wide)
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather_last(self, x: Tensor) -> Tensor:
        """Every rank's `x` side by side along the last axis, in rank order."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self.group)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """Rank `src`'s `x`, written into `x` on the others."""
        if self.size > 1:
            dist.broadcast(x, src, group=self.group)
        return x

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of every rank's `number`."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], dtype=torch.int64, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MIN, group=self.group)
        return int(shared.item())
