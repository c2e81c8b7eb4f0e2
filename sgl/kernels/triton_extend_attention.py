"""Attention of several new tokens per request over its paged KV, in Triton (FlashAttention 2).

Requests lie end to end, their keys are in the cache already. A program takes a run of tokens of one
request with all query heads of one KV head, so short runs still fill a tile:

    tile row r    token first + r // G, query head k * G + r % G

Axes: T tokens    H query heads    K key/value heads    G = H / K    E head size    M rows of a tile
      S slots of the cache    R, P rows and columns of the page table    N programs' runs
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.triton_attend_keys import attend_keys, matching


@triton.jit
def _extend_kernel(
    q,  # [T, H, E]
    keys,  # [S, K, E]
    values,  # [S, K, E]
    pages,  # [R, P]
    runs,  # [N, 4] int32: row of the page table, first token, its position, number of tokens
    out,  # [T, H, E]
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
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    run = runs + tl.program_id(0) * 4
    k = tl.program_id(1)
    row = tl.load(run).to(tl.int64)
    first_token = tl.load(run + 1)
    first_position = tl.load(run + 2)
    num_tokens = tl.load(run + 3)

    r = tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    offset = r // G
    is_query = (offset < num_tokens)[:, None] & (e < E)[None, :]
    token = (first_token + offset).to(tl.int64)
    head = (k * G + r % G) * E
    at_ME = (token * q_row_len + head)[:, None] + e[None, :]
    q_ME = matching(tl.load(q + at_ME, mask=is_query, other=0.0), keys)
    position = first_position + offset
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_L * BLOCK_L
    end = first_position + num_tokens
    acc_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    best_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    state = (acc_ME, best_M, sum_M)
    if not HAS_WINDOW:  # keys that all rows see need no mask
        masked_from = first_position // BLOCK_L * BLOCK_L
        state = attend_keys(
            state, q_ME, position, begin, masked_from, keys + k * E, values + k * E,
            pages + row * page_row_len, scale, soft_cap, window, PAGE_SIZE, K * E, E, BLOCK_E,
            BLOCK_L, HAS_SOFT_CAP, HAS_WINDOW, False,
        )  # fmt: skip
        begin = masked_from
    acc_ME, best_M, sum_M = attend_keys(
        state, q_ME, position, begin, end, keys + k * E, values + k * E,
        pages + row * page_row_len, scale, soft_cap, window, PAGE_SIZE, K * E, E, BLOCK_E,
        BLOCK_L, HAS_SOFT_CAP, HAS_WINDOW, True,
    )  # fmt: skip
    o_ME = acc_ME / tl.maximum(sum_M, 1e-30)[:, None]
    target = out + (token * (H * E) + head)[:, None] + e[None, :]
    tl.store(target, o_ME.to(out.dtype.element_ty), mask=is_query)


def choose_tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows and keys that a program looks at together, warps, stages; measured on an H200."""
    if head_dim > 128 or dtype == torch.float32:
        return 64, 32, 8, 2
    return (64, 64, 4, 2) if head_dim <= 64 else (128, 64, 4, 3)


def plan_runs(
    rows_B: np.ndarray,
    query_lens_B: np.ndarray,
    starts_B: np.ndarray,
    run_len: int,
) -> np.ndarray:
    """Divide every request's new tokens among programs: int32 [N, 4], the longest work first.

    rows_B, query_lens_B   page table row and number of new tokens of each request
    starts_B               tokens each had before
    run_len                tokens of a program: rows of its tile / query heads of a KV head
    """
    num_runs_B = -(-query_lens_B // run_len)
    index_N = np.repeat(np.arange(len(rows_B)), num_runs_B)
    number_N = np.arange(len(index_N)) - np.repeat(np.cumsum(num_runs_B) - num_runs_B, num_runs_B)
    offset_N = number_N * run_len
    first_B = np.cumsum(query_lens_B) - query_lens_B
    runs_N4 = np.stack(
        [
            rows_B[index_N],
            first_B[index_N] + offset_N,
            starts_B[index_N] + offset_N,
            np.minimum(query_lens_B[index_N] - offset_N, run_len),
        ],
        axis=1,
    ).astype(np.int32)
    return np.ascontiguousarray(runs_N4[np.argsort(-runs_N4[:, 2], kind="stable")])


def extend_attention(
    q_THE: Tensor,
    keys_SKE: Tensor,
    values_SKE: Tensor,
    pages_RP: Tensor,
    runs_N4: Tensor,
    out_THE: Tensor,
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    tile: tuple[int, int, int, int] | None = None,
) -> None:
    """Causal attention of the runs' tokens to their requests' tokens up to themselves.

    `runs_N4` is what `plan_runs` gave; `out_THE` is contiguous. A run may be empty.

    tile  as `choose_tile` gives it; the first of it is what `plan_runs` was told
    """
    _, H, E = q_THE.shape
    K = keys_SKE.shape[1]
    assert q_THE.stride()[1:] == (E, 1), f"queries of stride {q_THE.stride()} cannot be read"
    assert keys_SKE.is_contiguous(), "the cache must be contiguous"
    assert out_THE.is_contiguous(), "the output must be contiguous"
    tile_rows, block_l, num_warps, num_stages = tile or choose_tile(E, q_THE.dtype)
    _extend_kernel[(len(runs_N4), K)](
        q_THE,
        keys_SKE,
        values_SKE,
        pages_RP,
        runs_N4,
        out_THE,
        q_THE.stride(0),
        pages_RP.stride(0),
        scale,
        soft_cap or 0.0,
        window or 0,
        PAGE_SIZE=page_size,
        H=H,
        K=K,
        G=H // K,
        E=E,
        BLOCK_M=tile_rows,
        BLOCK_E=max(16, triton.next_power_of_2(E)),
        BLOCK_L=block_l,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_WINDOW=window is not None,
        num_warps=num_warps,
        num_stages=num_stages,
    )
