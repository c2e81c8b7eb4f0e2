"""Sums through the memory of other ranks: what one rank's kernel reads and writes."""

from __future__ import annotations

import os

import pytest
import torch

from sgl.kernels.peer_memory import PeerMemory
from sgl.kernels.rms_norm import add_rms_norm_reference
from sgl.kernels.triton_reduce_norm import reduce_rms_norm

MAX_ROWS, D = 8, 40


DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


class Ranks:
    """The memory of several ranks in one process; this test writes what other ranks would send."""

    def __init__(self, size: int) -> None:
        self.inboxes = [torch.zeros(2, size, MAX_ROWS, D, device=DEVICE) for _ in range(size)]
        self.flags = [torch.zeros(size, MAX_ROWS, dtype=torch.int32, device=DEVICE)] * size
        self.flags = [flags.clone() for flags in self.flags]
        self.memories = [
            PeerMemory(
                rank,
                size,
                MAX_ROWS,
                4 * D,
                *(
                    torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64, device=DEVICE)
                    for tensors in (self.inboxes, self.flags)
                ),
                torch.zeros(MAX_ROWS, dtype=torch.int32, device=DEVICE),
                self.inboxes[rank],
            )
            for rank in range(size)
        ]

    def send(self, source: int, target: int, part_TD: torch.Tensor, counts: list[int]) -> None:
        for row, count in enumerate(counts):
            self.inboxes[target][count % 2, source, row] = part_TD[row]
            self.flags[target][source, row] = count


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_adds_all_parts(size):
    ranks = Ranks(size)
    weight_D = torch.rand(D, device=DEVICE)
    counts = [0] * MAX_ROWS
    for T in (5, 8, 3, 8):  # rows are exchanged differently often
        counts[:T] = [count + 1 for count in counts[:T]]
        parts = torch.randn(size, T, D, device=DEVICE)
        stream_TD = torch.randn(T, D, device=DEVICE)
        wanted_stream_TD = stream_TD.clone()
        wanted_TD = add_rms_norm_reference(wanted_stream_TD, parts.sum(0), weight_D, 1e-5)
        for rank, memory in enumerate(ranks.memories):
            others = [other for other in range(size) if other != rank]
            for other in others:
                ranks.send(other, rank, parts[other], counts[:T])
            my_stream_TD = stream_TD.clone()
            got_TD = reduce_rms_norm(my_stream_TD, parts[rank], weight_D, 1e-5, memory)
            torch.testing.assert_close(my_stream_TD, wanted_stream_TD)
            torch.testing.assert_close(got_TD, wanted_TD)
            for other in others:
                for row in range(T):
                    sent_D = ranks.inboxes[other][counts[row] % 2, rank, row]
                    torch.testing.assert_close(sent_D, parts[rank, row])
                    assert ranks.flags[other][rank, row] == counts[row]


def test_rows_that_do_not_fit_go_elsewhere():
    memory = Ranks(2).memories[0]
    assert memory.takes(torch.zeros(MAX_ROWS, D))
    assert not memory.takes(torch.zeros(MAX_ROWS + 1, D))
    assert not memory.takes(torch.zeros(1, D, dtype=torch.bfloat16))
