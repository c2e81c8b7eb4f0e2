"""Attention of one new token per request over its paged KV, in Triton (split-KV, FlashDecoding).

    keys of one request   │ split 0 │ split 1 │ split 2 │      a program each, for one KV head
                               └─────────┼─────────┘
                                       merge                  weighted by their sums of exponentials

The query heads of a KV head share a program, so keys and values are read once. Programs of the same
request start one after the other: the heads of a token lie side by side in memory. How long a
request is, its program reads from the device: the same launch serves every step of a graph.

A prefix that several requests share is read once for all of them (cascade attention,
https://flashinfer.ai/2024/02/02/cascade-inference.html): programs of its own attend to it with the
queries of up to `members_per_block` requests, and what they find are further parts to merge.

Axes: B requests    H query heads    K key/value heads    G = H / K    E head size    X parts
      M rows of a tile    S slots of the cache    R, P rows and columns of the page table
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options
from sgl.kernels.triton_attend_keys import attend_keys, matching

MAX_SPLITS = 32
PREFIX_TILE_ROWS = 64
PROGRAMS_PER_CORE = 4  # so many fit on a multiprocessor and hide each other's waits


@triton.jit
def _attend_kernel(
    q,  # [B, H, E]
    keys,  # [S, K, E]
    values,  # [S, K, E]
    pages,  # [R, P]
    rows,  # [B]: row of the page table
    positions,  # [B]: of the new token, whose key is stored already
    prefix_lens,  # [B]: leading tokens that other programs attend to
    out,  # [B, H, E] with one part, else [B, H, X, E] float32
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
    NUM_PREFIX_SPLITS: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    k = tl.program_id(0)
    b = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(rows + b).to(tl.int64)
    kv_len = tl.load(positions + b).to(tl.int32) + 1
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(kv_len - window, 0)
    if NUM_PREFIX_SPLITS > 0:
        first = tl.load(prefix_lens + b)
    split_len = tl.cdiv(tl.cdiv(kv_len - first, NUM_SPLITS), BLOCK_L) * BLOCK_L
    begin = first + split * split_len
    end = tl.minimum(begin + split_len, kv_len)

    g = tl.arange(0, BLOCK_G)
    e = tl.arange(0, BLOCK_E)
    is_head = (g < G)[:, None] & (e < E)[None, :]
    heads = (k * G + g)[:, None] * E + e[None, :]
    q_GE = tl.load(q + b.to(tl.int64) * q_row_len + heads, mask=is_head, other=0.0)
    q_GE = matching(q_GE, keys)
    best_G = tl.full([BLOCK_G], float("-inf"), tl.float32)
    sum_G = tl.zeros([BLOCK_G], tl.float32)
    acc_GE = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
    last_G = tl.zeros([BLOCK_G], tl.int32) + (end - 1)
    acc_GE, best_G, sum_G = attend_keys(
        (acc_GE, best_G, sum_G), q_GE, last_G, begin, end, keys + k * E, values + k * E,
        pages + row * page_row_len, scale, soft_cap, 0, PAGE_SIZE, K * E, E, BLOCK_E,
        BLOCK_L, HAS_SOFT_CAP, False, True,
    )  # fmt: skip

    o_GE = acc_GE / tl.maximum(sum_G, 1e-30)[:, None]
    NUM_PARTS: tl.constexpr = NUM_SPLITS + NUM_PREFIX_SPLITS
    if NUM_PARTS == 1:
        target = out + b.to(tl.int64) * (H * E) + heads
        tl.store(target, o_GE.to(out.dtype.element_ty), mask=is_head)
    else:
        first_part_G = (b * H + k * G + g).to(tl.int64) * NUM_PARTS
        part_G = first_part_G + split
        tl.store(out + part_G[:, None] * E + e[None, :], o_GE, mask=is_head)
        tl.store(lse + part_G, best_G + tl.log2(tl.maximum(sum_G, 1e-30)), mask=g < G)
        if NUM_PREFIX_SPLITS > 0:
            if (first == 0) & (split == 0):  # nobody else writes the parts of its prefix
                for number in tl.static_range(NUM_PREFIX_SPLITS):
                    nothing_G = tl.full([BLOCK_G], float("-inf"), tl.float32)
                    tl.store(lse + first_part_G + NUM_SPLITS + number, nothing_G, mask=g < G)


@triton.jit
def _attend_prefix_kernel(
    q,  # [B, H, E]
    keys,  # [S, K, E]
    values,  # [S, K, E]
    pages,  # [R, P]
    rows,  # [B]: row of the page table
    blocks,  # [N, 2 + MEMBERS]: length of the prefix, number of members, members (of the B)
    out,  # [B, H, X, E] float32
    lse,  # [B, H, X] float32, base 2
    q_row_len,
    page_row_len,
    scale,
    soft_cap,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    FIRST_PART: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = blocks + tl.program_id(0) * (2 + MEMBERS)
    k = tl.program_id(1)
    split = tl.program_id(2)
    num_members = tl.load(block + 1)
    if num_members == 0:
        return
    prefix_len = tl.load(block)
    split_len = tl.cdiv(tl.cdiv(prefix_len, NUM_SPLITS), BLOCK_L) * BLOCK_L
    begin = split * split_len
    end = tl.minimum(begin + split_len, prefix_len)
    row = tl.load(rows + tl.load(block + 2)).to(tl.int64)

    r = tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    is_row = (r // G) < num_members
    is_query = is_row[:, None] & (e < E)[None, :]
    b_M = tl.load(block + 2 + r // G, mask=is_row, other=0).to(tl.int64)
    head_M = k * G + r % G
    at_ME = (b_M * q_row_len + head_M * E)[:, None] + e[None, :]
    q_ME = matching(tl.load(q + at_ME, mask=is_query, other=0.0), keys)
    best_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    last_M = tl.zeros([BLOCK_M], tl.int32) + (end - 1)
    acc_ME, best_M, sum_M = attend_keys(
        (acc_ME, best_M, sum_M), q_ME, last_M, begin, end, keys + k * E, values + k * E,
        pages + row * page_row_len, scale, soft_cap, 0, PAGE_SIZE, K * E, E, BLOCK_E,
        BLOCK_L, HAS_SOFT_CAP, False, True,
    )  # fmt: skip

    o_ME = acc_ME / tl.maximum(sum_M, 1e-30)[:, None]
    part_M = (b_M * H + head_M) * (FIRST_PART + NUM_SPLITS) + FIRST_PART + split
    tl.store(out + part_M[:, None] * E + e[None, :], o_ME, mask=is_query)
    tl.store(lse + part_M, best_M + tl.log2(tl.maximum(sum_M, 1e-30)), mask=is_row)


@triton.jit
def _merge_kernel(
    parts,  # [B, H, X, E] float32
    lse,  # [B, H, X] float32, base 2; -inf where a split had no keys
    out,  # [B, H, E]
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, BLOCK_X)
    e = tl.arange(0, BLOCK_E)
    lse_X = tl.load(lse + head * NUM_PARTS + x, mask=x < NUM_PARTS, other=float("-inf"))
    weights_X = tl.exp2(lse_X - tl.max(lse_X, axis=0))
    weights_X = weights_X / tl.sum(weights_X, axis=0)
    is_real = (lse_X > float("-inf"))[:, None] & (e < E)[None, :]
    at = (head * NUM_PARTS + x)[:, None] * E + e[None, :]
    o_XE = tl.load(parts + at, mask=is_real, other=0.0)
    o_E = tl.sum(o_XE * weights_X[:, None], axis=0)
    tl.store(out + head * E + e, o_E.to(out.dtype.element_ty), mask=e < E)


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Which requests share a prefix, on the device.

    lens_B    tokens at the start of each request that its block attends to; 0: it has none
    blocks    int32 [N, 2 + members_per_block]: the prefix's length, how many of the following
              count, the requests; a block without members does nothing
    splits    programs that divide a prefix among them
    """

    lens_B: Tensor
    blocks: Tensor
    splits: int


def members_per_block(group_size: int) -> int:
    """Requests whose query heads of one KV head fill a tile."""
    return max(1, PREFIX_TILE_ROWS // group_size)


def choose_tile(head_dim: int, num_requests: int, splits: int) -> tuple[int, int, int]:
    """Keys a program looks at together, warps, stages of its pipeline; measured on an H200."""
    if splits > 8:
        return (32, 2, 2) if head_dim <= 64 else (64, 8, 2)
    if head_dim <= 64:
        return (128, 4, 2) if num_requests <= 128 else (64, 2, 2)
    return 64, 2, 2


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
    prefixes: SharedPrefixes | None = None,
    tile: tuple[int, int, int] | None = None,
) -> None:
    """Attention of the token at `positions_B` of each request to itself and all before.

    A head's numbers lie together in `q_BHE`, and its heads; requests may lie apart. `out_BHE` is
    contiguous. With a window there are no `prefixes`.
    """
    B, H, E = q_BHE.shape
    K = keys_SKE.shape[1]
    assert q_BHE.stride()[1:] == (E, 1), f"queries of stride {q_BHE.stride()} cannot be read"
    assert keys_SKE.is_contiguous(), "the cache must be contiguous"
    assert out_BHE.is_contiguous(), "the output must be contiguous"
    assert window is None or prefixes is None, "a window may end inside a shared prefix"
    num_parts = splits + (prefixes.splits if prefixes else 0)
    if num_parts == 1:
        parts = lse = out_BHE
    else:
        parts = torch.empty((B, H, num_parts, E), dtype=torch.float32, device=q_BHE.device)
        lse = torch.empty((B, H, num_parts), dtype=torch.float32, device=q_BHE.device)
    block_l, num_warps, num_stages = tile or choose_tile(E, B, splits)
    inputs = (q_BHE, keys_SKE, values_SKE, pages_RP, rows_B)
    strides = (q_BHE.stride(0), pages_RP.stride(0))
    options: dict[str, Any] = {
        "PAGE_SIZE": page_size,
        "H": H,
        "K": K,
        "G": H // K,
        "E": E,
        "BLOCK_E": max(16, triton.next_power_of_2(E)),
        "HAS_SOFT_CAP": soft_cap is not None,
        "num_stages": num_stages,
        **launch_options(q_BHE.device),
    }
    _attend_kernel[(K, B, splits)](
        *inputs,
        positions_B,
        prefixes.lens_B if prefixes else positions_B,
        parts,
        lse,
        *strides,
        scale,
        soft_cap or 0.0,
        window or 0,
        BLOCK_G=max(16, triton.next_power_of_2(H // K)),
        BLOCK_L=block_l,
        NUM_SPLITS=splits,
        NUM_PREFIX_SPLITS=num_parts - splits,
        HAS_WINDOW=window is not None,
        num_warps=num_warps,
        **options,
    )
    if prefixes:
        _attend_prefix_kernel[(len(prefixes.blocks), K, prefixes.splits)](
            *inputs,
            prefixes.blocks,
            parts,
            lse,
            *strides,
            scale,
            soft_cap or 0.0,
            MEMBERS=prefixes.blocks.shape[1] - 2,
            BLOCK_M=max(16, triton.next_power_of_2((prefixes.blocks.shape[1] - 2) * (H // K))),
            BLOCK_L=64,
            NUM_SPLITS=prefixes.splits,
            FIRST_PART=splits,
            num_warps=4,
            **options,
        )
    if num_parts > 1:
        _merge_kernel[(B * H,)](
            parts,
            lse,
            out_BHE,
            E=E,
            BLOCK_E=options["BLOCK_E"],
            NUM_PARTS=num_parts,
            BLOCK_X=triton.next_power_of_2(num_parts),
            num_warps=2,
            **launch_options(q_BHE.device),
        )
