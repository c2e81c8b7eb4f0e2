"""The loop of every attention kernel: a tile of queries meets paged keys (FlashAttention 2).

Axes: M rows of the tile    L keys of a block    E head size
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matching(q_ME, keys):
    """The queries in a format that meets the keys: those of 8 bits are widened to float16, which
    holds each of them exactly and is what the device converts them to fastest."""
    if keys.dtype.element_ty.primitive_bitwidth == 8:
        q_ME = q_ME.to(tl.float16)
    return q_ME


@triton.jit
def attend_keys(
    state,  # acc_ME, best_M, sum_M
    q_ME,
    position,  # [M]
    begin,
    end,
    keys,  # of the KV head
    values,
    pages,  # of the request
    scale,
    soft_cap,
    window,
    PAGE_SIZE: tl.constexpr,
    SLOT_LEN: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Go on with the softmax of `q_ME` over the keys from `begin` to `end`, a block at a time.

    A row sees the keys up to its position, and of these the last `window`; without IS_MASKED it
    sees all of them.
    """
    acc_ME, best_M, sum_M = state
    e = tl.arange(0, BLOCK_E)
    for start in range(begin, end, BLOCK_L):
        n = start + tl.arange(0, BLOCK_L)
        is_key = n < end
        page = tl.load(pages + n // PAGE_SIZE, mask=is_key, other=0)
        slot = page.to(tl.int64) * PAGE_SIZE + n % PAGE_SIZE
        at = slot[:, None] * SLOT_LEN + e[None, :]
        is_real = is_key[:, None] & (e < E)[None, :]
        k_LE = tl.load(keys + at, mask=is_real, other=0.0).to(q_ME.dtype)
        scores_ML = tl.dot(q_ME, tl.trans(k_LE), input_precision="ieee")
        if HAS_SOFT_CAP:  # soft_cap * tanh(score / soft_cap), here and below in base 2
            scores_ML = soft_cap * (2 * tl.sigmoid(2 * scale * scores_ML / soft_cap) - 1)
            scores_ML = scores_ML * 1.4426950408889634
        else:
            scores_ML = scores_ML * (scale * 1.4426950408889634)
        if IS_MASKED:
            is_seen = n[None, :] <= position[:, None]
            if HAS_WINDOW:
                is_seen = is_seen & (n[None, :] > position[:, None] - window)
            scores_ML = tl.where(is_seen, scores_ML, float("-inf"))
        # rows that have seen no key yet must not compute inf - inf
        new_best_M = tl.maximum(tl.maximum(best_M, tl.max(scores_ML, axis=1)), -1e30)
        weights_ML = tl.exp2(scores_ML - new_best_M[:, None])
        fade_M = tl.exp2(best_M - new_best_M)
        sum_M = sum_M * fade_M + tl.sum(weights_ML, axis=1)
        v_LE = tl.load(values + at, mask=is_real, other=0.0).to(q_ME.dtype)
        acc_ME = acc_ME * fade_M[:, None]
        acc_ME += tl.dot(weights_ML.to(q_ME.dtype), v_LE, input_precision="ieee")
        best_M = new_best_M
    return acc_ME, best_M, sum_M
