"""Embedding in Triton: one program a token.

Axes: T tokens    D numbers of a row    V rows of the table
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options


@triton.jit
def _embed_kernel(
    token_ids,  # [T]
    table,  # [V, D]
    out,  # [T, D]
    first,
    num,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(token_ids + token) - first
    at = row * D + d
    x = tl.load(table + at, mask=(d < D) & (at >= 0) & (at < num * D), other=0.0)
    tl.store(out + token * D + d, x, mask=d < D)


def embed(token_ids_T: Tensor, table_VD: Tensor, first: int, num: int) -> Tensor:
    assert table_VD.is_contiguous(), "the table's rows must lie end to end"
    T, D = len(token_ids_T), table_VD.shape[1]
    out_TD = torch.empty((T, D), dtype=table_VD.dtype, device=table_VD.device)
    if T:
        _embed_kernel[(T,)](
            token_ids_T,
            table_VD,
            out_TD,
            first,
            num,
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=4,
            **launch_options(table_VD.device),
        )
    return out_TD
