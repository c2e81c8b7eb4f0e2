"""Attention over padded batches in plain torch: the reference, and what the CPU runs.

Axes: B sequences    H heads    Q queries    L keys    E head size
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_ALIGNMENT = 8  # rows of a mask that begin so many numbers apart need no copy on a GPU
EVEN_LEN = 32


def attention(
    q_BHQE: Tensor,
    k_BHLE: Tensor,
    v_BHLE: Tensor,
    mask: Tensor | None,
    scale: float,
    soft_cap: float | None = None,
) -> Tensor:
    """softmax(cap(q k' * scale) + mask) v; `mask` is added and broadcasts to [B, H, Q, L]."""
    if soft_cap is not None:
        return attention_reference(q_BHQE, k_BHLE, v_BHLE, mask, scale, soft_cap)[0]
    if q_BHQE.device.type == "cpu":
        return attention_with_lse(q_BHQE, k_BHLE, v_BHLE, mask, scale)[0]
    return F.scaled_dot_product_attention(q_BHQE, k_BHLE, v_BHLE, attn_mask=mask, scale=scale)


def attention_with_lse(
    q_BHQE: Tensor,
    k_BHLE: Tensor,
    v_BHLE: Tensor,
    mask: Tensor | None,
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, and the log of each query's sum of exponentials, float32 [B, H, Q]."""
    if soft_cap is not None or not _has_kernel(q_BHQE, mask):
        return attention_reference(q_BHQE, k_BHLE, v_BHLE, mask, scale, soft_cap)
    if mask is not None:
        mask = mask.expand(len(q_BHQE), q_BHQE.shape[1], q_BHQE.shape[2], k_BHLE.shape[2])
    if q_BHQE.device.type == "cpu":
        with _onednn(is_wanted=_is_even(q_BHQE) and _is_even(k_BHLE)):
            o_BHQE, lse_BHQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_BHQE, k_BHLE, v_BHLE, attn_mask=mask, scale=scale
            )
        return o_BHQE, lse_BHQ
    o_BHQE, padded_lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q_BHQE, k_BHLE, v_BHLE, mask, compute_log_sumexp=True, scale=scale
    )
    return o_BHQE, padded_lse[..., : q_BHQE.shape[2]]


@contextmanager
def _onednn(*, is_wanted: bool) -> Iterator[None]:
    """Without oneDNN, where it is not wanted and there is MKL to do the same.

    For 16-bit prompts torch's kernel compiles products with oneDNN, one for each remainder of the
    queries and of the keys by its blocks, and keeps them all: requests of all lengths come to
    gigabytes, and to more time than the faster products save.
    """
    mkldnn: Any = torch.backends.mkldnn
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    was_enabled = mkldnn.enabled
    mkldnn.enabled = was_enabled and (is_wanted or not has_mkl)
    try:
        yield
    finally:
        mkldnn.enabled = was_enabled


def _is_even(x_BHTE: Tensor) -> bool:
    """Whether there are few remainders of such lengths."""
    return x_BHTE.dtype == torch.float32 or x_BHTE.shape[2] % EVEN_LEN == 0


def _has_kernel(q_BHQE: Tensor, mask: Tensor | None) -> bool:
    """Whether torch has a fused kernel; on a GPU it reads vectors of eight numbers."""
    if q_BHQE.device.type == "cpu":
        return True
    is_aligned = mask is None or mask.stride(-2) % MASK_ALIGNMENT == 0
    return is_aligned and q_BHQE.shape[-1] % MASK_ALIGNMENT == 0


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> Tensor:
    """Join attention over two disjoint sets of keys; `o` [..., E], `lse` [...].

    Each part weighs in with its share of the summed exponentials (FlashInfer's merge_state).
    """
    share = torch.sigmoid(lse1.float() - lse2.float()).unsqueeze(-1).to(o1.dtype)
    return torch.lerp(o2, o1, share)


def attention_reference(
    q_BHQE: Tensor,
    k_BHLE: Tensor,
    v_BHLE: Tensor,
    mask: Tensor | None,
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, in float32."""
    scores = q_BHQE.float() @ k_BHLE.float().transpose(-1, -2) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores + mask.float()
    lse_BHQ = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - lse_BHQ.unsqueeze(-1))
    return (weights @ v_BHLE.float()).to(q_BHQE.dtype), lse_BHQ
