"""Lists of pages, in Triton; see page_lists.py for what they are.

A request's list begins where those before it end, which each program counts for itself: a thousand
numbers are one load.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.page_lists import PageLists

BLOCK = 1024
NUM_PARTS = 8  # programs of a request; a long context has a hundred thousand pages


@triton.jit(do_not_specialize=["page_row_len"])
def _write_page_lists_kernel(
    pages,  # [R, P]
    rows,  # [B]
    positions,  # [B]
    indptr,  # [B + 1]
    indices,  # [N]
    last_lens,  # [B]
    page_row_len,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    b = tl.program_id(0)
    part = tl.program_id(1)
    position = tl.load(positions + b)
    count = position // PAGE_SIZE + 1
    start = 0
    for first in range(0, b, BLOCK):
        i = first + tl.arange(0, BLOCK)
        before = tl.load(positions + i, mask=i < b, other=0)
        start += tl.sum(tl.where(i < b, before // PAGE_SIZE + 1, 0))
    if part == 0:
        tl.store(indptr + b, start)
        tl.store(indptr + b + 1, start + count)  # the next request's program writes the same
        tl.store(last_lens + b, position % PAGE_SIZE + 1)
    row = tl.load(rows + b).to(tl.int64)
    for first in range(part * BLOCK, count, NUM_PARTS * BLOCK):
        p = first + tl.arange(0, BLOCK)
        page = tl.load(pages + row * page_row_len + p, mask=p < count)
        tl.store(indices + start + p, page, mask=p < count)


def write_page_lists(
    pages_RP: Tensor, rows_B: Tensor, positions_B: Tensor, page_size: int, lists: PageLists
) -> None:
    B = len(rows_B)
    assert rows_B.stride(0) == positions_B.stride(0) == pages_RP.stride(1) == 1
    assert len(lists.indptr_B) == B + 1 == len(lists.last_lens_B) + 1
    if B:
        _write_page_lists_kernel[(B, NUM_PARTS)](
            pages_RP,
            rows_B,
            positions_B,
            lists.indptr_B,
            lists.indices_N,
            lists.last_lens_B,
            pages_RP.stride(0),
            PAGE_SIZE=page_size,
            BLOCK=BLOCK,
            NUM_PARTS=NUM_PARTS,
            num_warps=4,
        )
