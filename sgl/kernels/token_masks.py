"""Grammars: logits of ids that may not come next become -inf.

Axes: B rows with logits    V vocabulary    M masks    W words of a mask, V / 32 rounded up
"""

from __future__ import annotations

from functools import cache

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
    # Bytes are looked up and minima taken: on a CPU a tenth of the time that bits and a fill take.
    # Answers under one grammar often have the same mask.
    bounds = _bounds(logits_BV.dtype, logits_BV.device)
    found: dict[bytes, Tensor] = {}
    for row, mask_W in zip(rows_M.tolist(), masks_MW, strict=True):
        key = mask_W.cpu().numpy().tobytes()
        if key not in found:
            bounds_V = bounds.index_select(0, mask_W.view(torch.uint8).int()).flatten()
            found[key] = bounds_V[: logits_BV.shape[1]]
        torch.minimum(logits_BV[row], found[key], out=logits_BV[row])


@cache
def _bounds(dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each byte of a mask, the largest logits of its eight ids: [256, 8]."""
    bytes_256 = torch.arange(256, device=device).unsqueeze(1)
    is_allowed = (bytes_256 >> torch.arange(8, device=device)) & 1 == 1
    infinity = torch.tensor(torch.inf, dtype=dtype, device=device)
    return torch.where(is_allowed, infinity, -infinity)
