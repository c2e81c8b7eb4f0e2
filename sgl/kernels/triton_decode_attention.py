"""Attention of one new token per request over its paged KV, in Triton (split-KV, FlashDecoding).

    keys of one request   │ split 0 │ split 1 │ split 2 │      a program each, for one KV head
                               └─────────┼─────────┘
                                       merge                  weighted by their sums of exponentials

The query heads of a KV head share a program, so keys and values are read once. How long a request
is, its program reads from the device: the same launch serves every step of a recorded graph.

Axes: B requests    H query heads    K key/value heads    G = H / K    E head size    X splits
      S slots of the cache    R, P rows and columns of the page table
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options

BLOCK_L = 64  # keys a program looks at together
MAX_SPLITS = 32
PROGRAMS_PER_CORE = 4  # so many fit on a multiprocessor and hide each other's waits


@triton.jit
def _attend_kernel(
    q,  # [B, H, E]
    keys,  # [S, K, E]
    values,  # [S, K, E]
    pages,  # [R, P]
    rows,  # [B]: row of the page table
    positions,  # [B]: of the new token, whose key is stored already
    out,  # [B, H, E] with one split, else [B, H, X, E] float32
    lse,  # [B, H, X] float32, base 2
    q_row_len,
    page_row_len,
    scale,
    soft_cap,
    window,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    k = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(rows + b).to(tl.int64)
    kv_len = tl.load(positions + b).to(tl.int32) + 1
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(kv_len - window, 0)
    split_len = tl.cdiv(tl.cdiv(kv_len - first, NUM_SPLITS), BLOCK_L) * BLOCK_L
    begin = first + split * split_len
    end = tl.minimum(begin + split_len, kv_len)

    g = tl.arange(0, BLOCK_G)
    e = tl.arange(0, BLOCK_E)
    is_head = (g < G)[:, None] & (e < E)[None, :]
    heads = (k * G + g)[:, None] * E + e[None, :]
    q_GE = tl.load(q + b.to(tl.int64) * q_row_len + heads, mask=is_head, other=0.0)
    best_G = tl.full([BLOCK_G], float("-inf"), tl.float32)
    sum_G = tl.zeros([BLOCK_G], tl.float32)
    acc_GE = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
    for start in range(begin, end, BLOCK_L):
        n = start + tl.arange(0, BLOCK_L)
        is_key = n < end
        page = tl.load(pages + row * page_row_len + n // PAGE_SIZE, mask=is_key, other=0)
        slot = page.to(tl.int64) * PAGE_SIZE + n % PAGE_SIZE
        at = slot[:, None] * (K * E) + k * E + e[None, :]
        is_real = is_key[:, None] & (e < E)[None, :]
        k_LE = tl.load(keys + at, mask=is_real, other=0.0).to(q_GE.dtype)
        v_LE = tl.load(values + at, mask=is_real, other=0.0).to(q_GE.dtype)
        scores_GL = tl.dot(q_GE, tl.trans(k_LE), input_precision="ieee") * scale
        if HAS_SOFT_CAP:  # soft_cap * tanh(score / soft_cap)
            scores_GL = soft_cap * (2 * tl.sigmoid(2 * scores_GL / soft_cap) - 1)
        scores_GL = tl.where(is_key[None, :], scores_GL * 1.4426950408889634, float("-inf"))
        new_best_G = tl.maximum(best_G, tl.max(scores_GL, axis=1))
        weights_GL = tl.exp2(scores_GL - new_best_G[:, None])
        fade_G = tl.exp2(best_G - new_best_G)
        sum_G = sum_G * fade_G + tl.sum(weights_GL, axis=1)
        acc_GE = acc_GE * fade_G[:, None]
        acc_GE += tl.dot(weights_GL.to(q_GE.dtype), v_LE, input_precision="ieee")
        best_G = new_best_G

    o_GE = acc_GE / tl.maximum(sum_G, 1e-30)[:, None]
    if NUM_SPLITS == 1:
        target = out + b.to(tl.int64) * (H * E) + heads
        tl.store(target, o_GE.to(out.dtype.element_ty), mask=is_head)
    else:
        part_G = (b * H + k * G + g).to(tl.int64) * NUM_SPLITS + split
        tl.store(out + part_G[:, None] * E + e[None, :], o_GE, mask=is_head)
        tl.store(lse + part_G, best_G + tl.log2(tl.maximum(sum_G, 1e-30)), mask=g < G)


@triton.jit
def _merge_kernel(
    parts,  # [B, H, X, E] float32
    lse,  # [B, H, X] float32, base 2; -inf where a split had no keys
    out,  # [B, H, E]
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, BLOCK_X)
    e = tl.arange(0, BLOCK_E)
    lse_X = tl.load(lse + head * NUM_SPLITS + x, mask=x < NUM_SPLITS, other=float("-inf"))
    weights_X = tl.exp2(lse_X - tl.max(lse_X, axis=0))
    weights_X = weights_X / tl.sum(weights_X, axis=0)
    is_real = (lse_X > float("-inf"))[:, None] & (e < E)[None, :]
    at = (head * NUM_SPLITS + x)[:, None] * E + e[None, :]
    o_XE = tl.load(parts + at, mask=is_real, other=0.0)
    o_E = tl.sum(o_XE * weights_X[:, None], axis=0)
    tl.store(out + head * E + e, o_E.to(out.dtype.element_ty), mask=e < E)


def num_splits(num_requests: int, num_kv_heads: int, num_cores: int) -> int:
    """Splits per request: as few as keep the device busy. A power of two."""
    programs = max(num_requests * num_kv_heads, 1)
    wanted = num_cores * PROGRAMS_PER_CORE // programs
    return min(MAX_SPLITS, 1 << max(wanted, 1).bit_length() - 1)


def decode_attention(
    q_BHE: Tensor,
    keys_SKE: Tensor,
    values_SKE: Tensor,
    pages_RP: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    out_BHE: Tensor,
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    splits: int = 1,
) -> None:
    """Attention of the token at `positions_B` of each request to itself and all before.

    A head's numbers lie together in `q_BHE`, and its heads; requests may lie apart. `out_BHE` is
    contiguous.
    """
    B, H, E = q_BHE.shape
    K = keys_SKE.shape[1]
    assert q_BHE.stride()[1:] == (E, 1), f"queries of stride {q_BHE.stride()} cannot be read"
    assert keys_SKE.is_contiguous(), "the cache must be contiguous"
    assert out_BHE.is_contiguous(), "the output must be contiguous"
    block_e = max(16, triton.next_power_of_2(E))
    options = launch_options(q_BHE.device)
    if splits == 1:
        parts, lse = out_BHE, out_BHE
    else:
        parts = torch.empty((B, H, splits, E), dtype=torch.float32, device=q_BHE.device)
        lse = torch.empty((B, H, splits), dtype=torch.float32, device=q_BHE.device)
    _attend_kernel[(B, K, splits)](
        q_BHE,
        keys_SKE,
        values_SKE,
        pages_RP,
        rows_B,
        positions_B,
        parts,
        lse,
        q_BHE.stride(0),
        pages_RP.stride(0),
        scale,
        soft_cap or 0.0,
        window or 0,
        PAGE_SIZE=page_size,
        H=H,
        K=K,
        G=H // K,
        E=E,
        BLOCK_G=max(16, triton.next_power_of_2(H // K)),
        BLOCK_E=block_e,
        BLOCK_L=BLOCK_L,
        NUM_SPLITS=splits,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_WINDOW=window is not None,
        num_warps=4,
        num_stages=3,
        **options,
    )
    if splits > 1:
        _merge_kernel[(B * H,)](
            parts,
            lse,
            out_BHE,
            E=E,
            BLOCK_E=block_e,
            NUM_SPLITS=splits,
            BLOCK_X=triton.next_power_of_2(splits),
            num_warps=2,
            **options,
        )
