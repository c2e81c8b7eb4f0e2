"""The tensor-parallel group: what the ranks of one model exchange; one alone exchanges nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sgl.kernels.peer_memory import MAX_WORD_ROWS, PeerMemory
from sgl.kernels.rms_norm import add_rms_norm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the `size` ranks that hold one model together.

    Every rank must make the same calls in the same order.

    peers  memory of the other GPUs for small sums, where there is any
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    peers: PeerMemory | None = None

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

    def with_peer_memory(
        self, device: torch.device, max_rows: int, row_bytes: int, *, check: bool = False
    ) -> TensorParallel:
        """The same group, which sums rows of `row_bytes` through the GPUs' memory where it can.

        check  first send numbers through it and compare the sums with NCCL's
        """
        if self.group is None or device.type != "cuda":
            return self
        peers = PeerMemory.open(self.group, device, max_rows, row_bytes)
        if peers and check and not self._sums_are_right(peers, device):
            logger.warning("Sums go through NCCL: numbers written to another GPU do not arrive")
            peers = None
        return replace(self, peers=peers)

    def _sums_are_right(self, peers: PeerMemory, device: torch.device) -> bool:
        """A collective call, with the same answer on every rank."""
        generator = torch.Generator(device).manual_seed(self.rank)
        # few rows and many go in different ways
        nums_rows = [min(num, peers.max_rows) for num in (MAX_WORD_ROWS, 2 * MAX_WORD_ROWS)]
        shape = (max(nums_rows), peers.row_bytes // 2)
        part_TD = torch.randn(shape, generator=generator, device=device).half()
        weight_D = torch.ones(shape[1], device=device)
        expected_TD = self.all_reduce(part_TD.float()).half()
        is_right = True
        for num in nums_rows * 4:
            stream_TD = torch.zeros_like(part_TD[:num])
            replace(self, peers=peers).add_rms_norm(stream_TD, part_TD[:num], weight_D, 1e-6)
            is_right &= torch.allclose(stream_TD, expected_TD[:num], rtol=1e-2, atol=1e-2)
        return bool(self.smallest(int(is_right), device))

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

    def add_rms_norm(
        self, stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float
    ) -> Tensor:
        """Add every rank's `delta_TD` to `stream_TD` in place; returns the norm of the sum."""
        if self.peers is not None and self.peers.takes(delta_TD):
            from sgl.kernels import triton_reduce_norm

            return triton_reduce_norm.reduce_rms_norm(
                stream_TD, delta_TD, weight_D, eps, self.peers
            )
        return add_rms_norm(stream_TD, self.all_reduce(delta_TD), weight_D, eps)

    def all_gather_last(self, x: Tensor) -> Tensor:
        """Every rank's `x` side by side along the last axis, in rank order."""
        if self.size == 1:
            return x
        parts = torch.empty((self.size * len(x), *x.shape[1:]), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(parts, x.contiguous(), group=self.group)
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2).contiguous()

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
