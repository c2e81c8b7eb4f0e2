"""Sums through the memory of other ranks: what one rank's kernel reads and writes."""

from __future__ import annotations

import os

import pytest
import torch

from sgl.kernels.peer_memory import MAX_WORD_ROWS, PeerMemory
from sgl.kernels.rms_norm import rms_norm_reference
from sgl.kernels.triton_reduce_norm import reduce_rms_norm

MAX_ROWS, D = MAX_WORD_ROWS + 2, 40


DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


class Ranks:
    """The memory of several ranks in one process; this test writes what other ranks would send."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        num_words = D * dtype.itemsize // 4
        self.dtype = dtype
        self.inboxes = self._per_rank(size, (2, size, MAX_ROWS, D), dtype)
        self.flags = self._per_rank(size, (size, MAX_ROWS), torch.int32)
        self.words = self._per_rank(size, (2, size, MAX_WORD_ROWS, num_words), torch.int64)
        self.memories = [
            PeerMemory(
                rank=rank,
                size=size,
                max_rows=MAX_ROWS,
                row_bytes=D * dtype.itemsize,
                inboxes_N=_addresses(self.inboxes),
                flags_N=_addresses(self.flags),
                counts_R=torch.zeros(MAX_ROWS, dtype=torch.int32, device=DEVICE),
                words_N=_addresses(self.words),
                word_counts_R=torch.zeros(MAX_WORD_ROWS, dtype=torch.int32, device=DEVICE),
                memory=self.inboxes[rank],
            )
            for rank in range(size)
        ]

    def _per_rank(self, size: int, shape: tuple[int, ...], dtype: torch.dtype):
        return [torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(size)]

    def place(self, source: int, target: int, T: int, row: int, count: int):
        """Where a row goes, and the flag that tells of it, if there is one."""
        if T <= MAX_WORD_ROWS:
            return self.words[target][count % 2, source, row], None
        return self.inboxes[target][count % 2, source, row], self.flags[target][source, row]

    def send(self, source: int, target: int, part_TD: torch.Tensor, counts: list[int]) -> None:
        for row, (part_D, count) in enumerate(zip(part_TD, counts, strict=True)):
            inbox, flag = self.place(source, target, len(counts), row, count)
            inbox.copy_(_words(part_D, count) if flag is None else part_D)
            if flag is not None:
                flag.fill_(count)

    def check_sent(
        self, source: int, target: int, part_TD: torch.Tensor, counts: list[int]
    ) -> None:
        for row, (part_D, count) in enumerate(zip(part_TD, counts, strict=True)):
            inbox, flag = self.place(source, target, len(counts), row, count)
            assert torch.equal(inbox, _words(part_D, count) if flag is None else part_D)
            assert flag is None or flag == count


def _addresses(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64, device=DEVICE)


def _words(part_D: torch.Tensor, count: int) -> torch.Tensor:
    return (part_D.view(torch.int32).long() & 0xFFFFFFFF) | count << 32


FEW, MANY = (5, 8, 3, 8), (MAX_WORD_ROWS + 1, MAX_ROWS)


@pytest.mark.parametrize(
    ("lens", "size", "dtype"),
    [
        (FEW, 2, torch.float32),
        (FEW, 2, torch.float16),
        (FEW, 3, torch.bfloat16),
        (MANY, 3, torch.float16),
    ],
)
def test_every_rank_adds_all_parts(lens, size, dtype):
    ranks = Ranks(size, dtype)
    weight_D = torch.rand(D, device=DEVICE)
    counts = [0] * MAX_ROWS
    for T in lens:  # rows are exchanged differently often
        counts[:T] = [count + 1 for count in counts[:T]]
        parts = torch.randn(size, T, D, device=DEVICE).to(dtype)
        stream_TD = torch.randn(T, D, device=DEVICE).to(dtype)
        wanted_stream_TD = (stream_TD.float() + parts.float().sum(0)).to(dtype)
        wanted_TD = rms_norm_reference(wanted_stream_TD, weight_D, 1e-5)
        for rank, memory in enumerate(ranks.memories):
            others = [other for other in range(size) if other != rank]
            for other in others:
                ranks.send(other, rank, parts[other], counts[:T])
            my_stream_TD = stream_TD.clone()
            got_TD = reduce_rms_norm(my_stream_TD, parts[rank], weight_D, 1e-5, memory)
            torch.testing.assert_close(my_stream_TD, wanted_stream_TD)
            torch.testing.assert_close(got_TD, wanted_TD)
            for other in others:
                ranks.check_sent(rank, other, parts[rank], counts[:T])


def test_rows_that_do_not_fit_go_elsewhere():
    memory = Ranks(2, torch.float32).memories[0]
    assert memory.takes(torch.zeros(MAX_ROWS, D))
    assert not memory.takes(torch.zeros(MAX_ROWS + 1, D))
    assert not memory.takes(torch.zeros(1, D, dtype=torch.bfloat16))
