"""Grammars: logits of ids that may not come next become -inf.

Axes: B rows with logits    V vocabulary    M rows with a mask    D different masks
      W words of a mask, V / 32 rounded up
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

MAX_FILLED_WORDS = 512  # of a mask that are not all ones; more, and minima take less time


def apply_token_masks(logits_BV: Tensor, rows_M: Tensor, masks_DW: Tensor, which_M: Tensor) -> None:
    """Change logits in place.

    rows_M    int32: which of the B rows have a mask; none twice
    masks_DW  int32: a bit for each id that may come next, the lowest first
    which_M   int32: which of the masks each row has
    """
    assert rows_M.dtype == masks_DW.dtype == which_M.dtype == torch.int32, "all are int32"
    assert rows_M.shape == which_M.shape, f"{rows_M.shape} rows, {which_M.shape} masks"
    num_words = -(-logits_BV.shape[1] // 32)
    assert masks_DW.shape[1] == num_words, f"masks {masks_DW.shape} for logits {logits_BV.shape}"
    if logits_BV.device.type == "cuda":
        from sgl.kernels import triton_token_masks

        triton_token_masks.apply_token_masks(logits_BV, rows_M, masks_DW, which_M)
    else:
        apply_token_masks_reference(logits_BV, rows_M, masks_DW, which_M)


def apply_token_masks_reference(
    logits_BV: Tensor, rows_M: Tensor, masks_DW: Tensor, which_M: Tensor
) -> None:
    edits = [_edit(mask_W, logits_BV) for mask_W in masks_DW.cpu()]
    for row, which in zip(rows_M.tolist(), which_M.tolist(), strict=True):
        edits[which](logits_BV[row])


def _edit(mask_W: Tensor, logits_BV: Tensor) -> Callable[[Tensor], Tensor]:
    """Of one row, in place: a mask that forbids few ids fills these in, another takes minima."""
    vocab_size, device = logits_BV.shape[1], logits_BV.device
    words_W = mask_W.numpy()
    mixed_X = np.flatnonzero(words_W != -1)
    if len(mixed_X) > MAX_FILLED_WORDS:
        # bytes are looked up: a tenth of the time that single bits and a fill take
        bounds = _bounds(logits_BV.dtype, device)
        indices_X = mask_W.view(torch.uint8).int().to(device)
        bounds_V = bounds.index_select(0, indices_X).flatten()[:vocab_size]
        return lambda logits_V: torch.minimum(logits_V, bounds_V, out=logits_V)
    bits_X = np.flatnonzero(np.unpackbits(~words_W[mixed_X].view(np.uint8), bitorder="little"))
    ids_X = mixed_X[bits_X // 32] * 32 + bits_X % 32
    forbidden_X = torch.from_numpy(ids_X[ids_X < vocab_size]).to(device)
    return lambda logits_V: logits_V.index_fill_(0, forbidden_X, -torch.inf)


@cache
def _bounds(dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each byte of a mask, the largest logits of its eight ids: [256, 8]."""
    bytes_256 = torch.arange(256, device=device).unsqueeze(1)
    is_allowed = (bytes_256 >> torch.arange(8, device=device)) & 1 == 1
    infinity = torch.tensor(torch.inf, dtype=dtype, device=device)
    return torch.where(is_allowed, infinity, -infinity)
