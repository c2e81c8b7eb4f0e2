"""The pages of several requests end to end, for kernels that know no page table.

    page table   row a: 7 3 9 …    row b: 4 8 …         a has 3 pages of 16 tokens, b has 1
    lists        indices 7 3 9 4   indptr 0 3 4         lengths of the last pages: 12, 5

Axes: B requests    N pages of all of them    R, P rows and columns of the page table
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PageLists(NamedTuple):
    """Request b has `indices_N[indptr_B[b] : indptr_B[b + 1]]`; all int32.

    indptr_B      one number more than there are requests
    last_lens_B   tokens in the last page of each request, at least 1
    """

    indptr_B: Tensor
    indices_N: Tensor
    last_lens_B: Tensor

    @classmethod
    def empty(cls, num_requests: int, indices_N: Tensor) -> PageLists:
        """Lists to be written, with `indices_N` as the room for the pages."""
        indptr_B = torch.empty(num_requests + 1, dtype=torch.int32, device=indices_N.device)
        last_lens_B = torch.empty(num_requests, dtype=torch.int32, device=indices_N.device)
        return cls(indptr_B, indices_N, last_lens_B)


def write_page_lists(
    pages_RP: Tensor, rows_B: Tensor, positions_B: Tensor, page_size: int, lists: PageLists
) -> None:
    """List the pages of the tokens up to and with `positions_B`; the host learns no length.

    The rows and positions are int32. `lists.indices_N` must have room for all pages.
    """
    if pages_RP.device.type == "cuda":
        from sgl.kernels import triton_page_lists

        triton_page_lists.write_page_lists(pages_RP, rows_B, positions_B, page_size, lists)
    else:
        write_page_lists_reference(pages_RP, rows_B, positions_B, page_size, lists)


def write_page_lists_reference(
    pages_RP: Tensor, rows_B: Tensor, positions_B: Tensor, page_size: int, lists: PageLists
) -> None:
    counts_B = positions_B // page_size + 1
    lists.indptr_B[0] = 0
    lists.indptr_B[1:] = counts_B.cumsum(0)
    lists.last_lens_B.copy_(positions_B % page_size + 1)
    columns_P = torch.arange(pages_RP.shape[1], device=pages_RP.device)
    pages_N = pages_RP[rows_B.long()][columns_P < counts_B.unsqueeze(1)]
    lists.indices_N[: len(pages_N)] = pages_N
