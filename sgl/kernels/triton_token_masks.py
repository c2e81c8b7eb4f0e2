"""Grammars' masks in Triton; see token_masks.py for what they do.

Axes: B rows with logits    V vocabulary    M rows with a mask    D different masks
      W words of a mask
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options

BLOCK_V = 2048


@triton.jit
def _apply_token_masks_kernel(
    logits,  # [B, V]
    rows,  # [M]
    masks,  # [D, W] int32
    which,  # [M]
    row_len,
    V,
    W,
    BLOCK_V: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.load(rows + m).to(tl.int64)
    mask = tl.load(which + m).to(tl.int64)
    word = tl.load(masks + mask * W + v // 32, mask=v < V, other=0)
    is_forbidden = ((word >> (v % 32)) & 1) == 0
    tl.store(logits + row * row_len + v, float("-inf"), mask=is_forbidden & (v < V))


def apply_token_masks(logits_BV: Tensor, rows_M: Tensor, masks_DW: Tensor, which_M: Tensor) -> None:
    assert logits_BV.stride(1) == 1, "the logits of a row must lie end to end"
    assert masks_DW.is_contiguous(), "the masks must lie end to end"
    num_rows, num_ids = len(rows_M), logits_BV.shape[1]
    if num_rows:
        _apply_token_masks_kernel[(num_rows, triton.cdiv(num_ids, BLOCK_V))](
            logits_BV,
            rows_M,
            masks_DW,
            which_M,
            logits_BV.stride(0),
            num_ids,
            masks_DW.shape[1],
            BLOCK_V=BLOCK_V,
            num_warps=4,
            **launch_options(logits_BV.device),
        )
