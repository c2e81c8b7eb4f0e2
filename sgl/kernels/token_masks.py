"""Grammars: logits of ids that may not come next become -inf.

Axes: B rows with logits    V vocabulary    M masks    W words of a mask, V / 32 rounded up
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_token_masks(logits_BV: Tensor, rows_M: Tensor, masks_MW: Tensor) -> None:
    """Change logits in place.

    rows_M    int32: which of the B rows each mask is for; no two for one
    masks_MW  int32: a bit for each id that may come next, the lowest first
    """
    assert rows_M.dtype == masks_MW.dtype == torch.int32, f"{rows_M.dtype}, {masks_MW.dtype}"
    num_words = -(-logits_BV.shape[1] // 32)
    assert masks_MW.shape[1] == num_words, f"masks {masks_MW.shape} for logits {logits_BV.shape}"
    if logits_BV.device.type == "cuda":
        from sgl.kernels import triton_token_masks

        triton_token_masks.apply_token_masks(logits_BV, rows_M, masks_MW)
    else:
        apply_token_masks_reference(logits_BV, rows_M, masks_MW)


def apply_token_masks_reference(logits_BV: Tensor, rows_M: Tensor, masks_MW: Tensor) -> None:
    bits_32 = torch.arange(32, dtype=torch.int32, device=masks_MW.device)
    is_allowed_MV = ((masks_MW.unsqueeze(-1) >> bits_32) & 1).flatten(1)[:, : logits_BV.shape[1]]
    masked_MV = logits_BV[rows_M].masked_fill_(is_allowed_MV == 0, float("-inf"))
    logits_BV.index_copy_(0, rows_M.long(), masked_MV)
