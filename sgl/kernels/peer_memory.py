"""Memory of the other GPUs of this host that kernels write to directly, over NVLink or PCIe.

    rank 0's kernel ── row of a partial sum ──▶ inbox of rank 1     then raises a flag there
    rank 0's inbox  ◀── row of a partial sum ── rank 1's kernel     and waits for its own

A small sum over ranks so costs the way of one message. Few rows need not even a flag: they are sent
as words of 64 bits, half of which count the exchanges, so a word that has arrived says so itself
(the protocol that NCCL calls LL). That saves waiting for the row to be there before the flag goes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

MANY_RANKS_MAX_ROWS = 512  # each row goes to every other rank: beyond, NCCL's rings send less
MAX_WORD_ROWS = 128  # words are twice as long as the numbers in them


@dataclass(frozen=True, eq=False)
class PeerMemory:
    """An inbox and flags in every rank's memory, all of the same layout.

    inboxes_N   addresses of the inboxes: [2, N sources, max_rows, row_bytes], of which a row uses
                the two in turn: a rank that is ahead does not overwrite what is being read
    flags_N     addresses of the flags: int32 [N sources, max_rows], counting what has arrived
    counts_R    int32 [max_rows]: exchanges of each row, the same on every rank
    words_N, word_counts_R   the same for rows sent as words: int64 [2, N, MAX_WORD_ROWS, row words]
    """

    rank: int
    size: int
    max_rows: int
    row_bytes: int
    inboxes_N: Tensor
    flags_N: Tensor
    counts_R: Tensor
    words_N: Tensor
    word_counts_R: Tensor
    memory: Tensor

    @classmethod
    def open(
        cls, group: dist.ProcessGroup, device: torch.device, max_rows: int, row_bytes: int
    ) -> PeerMemory | None:
        """Map the memory of all ranks into each; None where the GPUs cannot reach each other.

        A collective call: every rank gets the same answer, the reason is logged.
        """
        import torch.distributed._symmetric_memory as symmetric

        rank, size = group.rank(), group.size()
        if size > 2:
            max_rows = min(max_rows, MANY_RANKS_MAX_ROWS)
        problem = _unreachable(device, size)
        if not _agree(group, device, not problem):
            logger.warning("Sums go through NCCL: %s", problem or "another rank cannot reach us")
            return None
        num_bytes = {
            "flags": 4 * size * max_rows,
            "words": 2 * size * MAX_WORD_ROWS * 2 * row_bytes,
            "inbox": 2 * size * max_rows * row_bytes,
        }
        ends = list(accumulate(-(-num // 256) * 256 for num in num_bytes.values()))
        starts = dict(zip(num_bytes, [0, *ends[:-1]], strict=True))
        memory = symmetric.empty(ends[-1], dtype=torch.uint8, device=device)
        memory.zero_()
        handle = symmetric.rendezvous(memory, group)
        dist.barrier(group)  # nobody writes before all have zeroed
        first_N = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
        return cls(
            rank=rank,
            size=size,
            max_rows=max_rows,
            row_bytes=row_bytes,
            inboxes_N=first_N + starts["inbox"],
            flags_N=first_N + starts["flags"],
            counts_R=torch.zeros(max_rows, dtype=torch.int32, device=device),
            words_N=first_N + starts["words"],
            word_counts_R=torch.zeros(MAX_WORD_ROWS, dtype=torch.int32, device=device),
            memory=memory,
        )

    def takes(self, x_TD: Tensor) -> bool:
        """Whether the inboxes have room for rows like these."""
        T, D = x_TD.shape
        return self.max_rows >= T and D * x_TD.itemsize == self.row_bytes


def _unreachable(device: torch.device, size: int) -> str:
    """Which GPU this one cannot reach, in a few words; empty if it reaches all."""
    first = device.index - dist.get_rank()
    for other in range(first, first + size):
        if other != device.index and not torch.cuda.can_device_access_peer(device.index, other):
            return f"GPU {device.index} cannot access the memory of GPU {other}"
    return ""


def _agree(group: dist.ProcessGroup, device: torch.device, is_fine: bool) -> bool:
    fine = torch.tensor([int(is_fine)], device=device)
    dist.all_reduce(fine, dist.ReduceOp.MIN, group=group)
    return bool(fine.item())
