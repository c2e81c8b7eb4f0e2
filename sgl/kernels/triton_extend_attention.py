"""Attention of several new tokens per request over its paged KV, in Triton (FlashAttention 2).

Requests lie end to end, their keys are in the cache already. A program takes a run of tokens of one
request with all query heads of one KV head, so short runs still fill a tile:

    tile row r    token first + r // G, query head k * G + r % G

Where few runs have many keys, as in a chunk of a long prompt, several programs share a run: each
takes a part of its keys, and what they find is merged.

Axes: T tokens    H query heads    K key/value heads    G = H / K    E head size    M rows of a tile
      S slots of the cache    R, P rows and columns of the page table    N runs, parts counted
      J runs that are merged    X their parts    L tokens of a run
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.triton_attend_keys import attend_keys, matching

MIN_PART_KEYS = 1024  # fewer are read sooner than merged
PART_UNIT = 128  # keys: whole blocks
MERGED_ROWS = 16


@triton.jit
def _extend_kernel(
    q,  # [T, H, E]
    keys,  # [S, K, E]
    values,  # [S, K, E]
    pages,  # [R, P]
    runs,  # [N, 8] int32: as in `Runs`
    out,  # [T, H, E]
    parts,  # [X, H, L, E] float32
    lse,  # [X, H, L] float32, base 2
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
    HAS_PARTS: tl.constexpr,
):
    run = runs + tl.program_id(0) * 8
    k = tl.program_id(1)
    row = tl.load(run).to(tl.int64)
    first_token = tl.load(run + 1)
    first_position = tl.load(run + 2)
    num_tokens = tl.load(run + 3)
    begin = tl.load(run + 4)
    end = tl.load(run + 5)
    part = tl.load(run + 6) - 1

    r = tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    offset = r // G
    is_query = (offset < num_tokens)[:, None] & (e < E)[None, :]
    token = (first_token + offset).to(tl.int64)
    head = (k * G + r % G) * E
    at_ME = (token * q_row_len + head)[:, None] + e[None, :]
    q_ME = matching(tl.load(q + at_ME, mask=is_query, other=0.0), keys)
    position = first_position + offset
    if HAS_WINDOW:
        begin = tl.maximum(begin, (first_position - window + 1) // BLOCK_L * BLOCK_L)
    acc_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    best_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    state = (acc_ME, best_M, sum_M)
    if not HAS_WINDOW:  # keys that all rows see need no mask
        masked_from = tl.maximum(begin, tl.minimum(end, first_position // BLOCK_L * BLOCK_L))
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
    if HAS_PARTS:
        if part < 0:
            tl.store(target, o_ME.to(out.dtype.element_ty), mask=is_query)
        else:
            L: tl.constexpr = BLOCK_M // G
            at_M = (part * H + k * G + r % G).to(tl.int64) * L + offset
            tl.store(parts + at_M[:, None] * E + e[None, :], o_ME, mask=is_query)
            lse_M = best_M + tl.log2(tl.maximum(sum_M, 1e-30))
            tl.store(lse + at_M, lse_M, mask=offset < num_tokens)
    else:
        tl.store(target, o_ME.to(out.dtype.element_ty), mask=is_query)


@triton.jit
def _merge_kernel(
    merges,  # [J, 8] int32: as in `Runs`
    parts,  # [X, H, L, E] float32
    lse,  # [X, H, L] float32, base 2
    out,  # [T, H, E]
    H: tl.constexpr,
    E: tl.constexpr,
    L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    merge = merges + tl.program_id(0) * 8
    h = tl.program_id(1)
    first_token = tl.load(merge)
    num_tokens = tl.load(merge + 1)
    first_part = tl.load(merge + 2)
    num_parts = tl.load(merge + 3)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.arange(0, BLOCK_E)
    is_row = r < num_tokens
    is_real = is_row[:, None] & (e < E)[None, :]
    acc_RE = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    best_R = tl.full([BLOCK_R], -1e30, tl.float32)
    sum_R = tl.zeros([BLOCK_R], tl.float32)
    for part in range(first_part, first_part + num_parts):
        at_R = (part * H + h).to(tl.int64) * L + r
        lse_R = tl.load(lse + at_R, mask=is_row, other=float("-inf"))
        o_RE = tl.load(parts + at_R[:, None] * E + e[None, :], mask=is_real, other=0.0)
        new_best_R = tl.maximum(best_R, lse_R)
        fade_R, weight_R = tl.exp2(best_R - new_best_R), tl.exp2(lse_R - new_best_R)
        acc_RE = acc_RE * fade_R[:, None] + o_RE * weight_R[:, None]
        sum_R = sum_R * fade_R + weight_R
        best_R = new_best_R
    o_RE = acc_RE / tl.maximum(sum_R, 1e-30)[:, None]
    token_R = (first_token + r).to(tl.int64)
    target = out + (token_R * H + h)[:, None] * E + e[None, :]
    tl.store(target, o_RE.to(out.dtype.element_ty), mask=is_real)


def choose_tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows and keys that a program looks at together, warps, stages; measured on an H200."""
    if head_dim > 128 or dtype == torch.float32:
        return 64, 32, 8, 2
    return (64, 64, 4, 2) if head_dim <= 64 else (128, 64, 4, 3)


@dataclass(frozen=True, slots=True)
class RunPlanner:
    """Divides prompts among programs.

    run_len       tokens of a run: rows of a tile / query heads of a KV head
    num_programs  of one KV head, that run at the same time

    A plan is int32 [J + N, 8]. The first J = `max_merges` rows are runs that are merged from parts,
    where there are any: first token, number of tokens, first part, number of parts. The others are
    the runs and parts: row of the page table, first token, its position, number of tokens, first
    key, end of the keys, number of the part + 1 or 0 for a whole run. Zeros mean nothing to do.
    """

    run_len: int
    num_programs: int

    @property
    def max_merges(self) -> int:
        return self.num_programs // 2

    def max_rows(self, num_tokens: int, num_short: int) -> int:
        """Of a plan for prompts of so many tokens, of which so many leave a run shorter."""
        num_runs = -(-num_tokens // self.run_len) + num_short
        return self.max_merges + num_runs + self.num_programs

    def plan(
        self,
        rows_B: np.ndarray,
        query_lens_B: np.ndarray,
        starts_B: np.ndarray,
        first_token: int = 0,
    ) -> np.ndarray:
        """The longest work first.

        rows_B, query_lens_B   page table row and number of new tokens of each request
        starts_B               tokens each had before
        first_token            where the first request's tokens begin; the others' follow
        """
        num_runs_B = -(-query_lens_B // self.run_len)
        request_N, number_N = _repeat(num_runs_B)
        offset_N = number_N * self.run_len
        first_token_B = first_token + np.cumsum(query_lens_B) - query_lens_B
        first_token_N = first_token_B[request_N] + offset_N
        position_N = starts_B[request_N] + offset_N
        num_tokens_N = np.minimum(query_lens_B[request_N] - offset_N, self.run_len)
        end_N = position_N + num_tokens_N

        part_len_N = self._part_lens(end_N)
        num_parts_N = -(-end_N // part_len_N)
        run_X, number_X = _repeat(num_parts_N)
        begin_X = number_X * part_len_N[run_X]
        end_X = np.minimum(begin_X + part_len_N[run_X], end_N[run_X])
        is_part_X = num_parts_N[run_X] > 1
        part_X = np.where(is_part_X, np.cumsum(is_part_X), 0)
        runs = [rows_B[request_N], first_token_N, position_N, num_tokens_N]
        runs_X8 = np.zeros((len(run_X), 8), np.int32)
        runs_X8[:, :7] = np.stack([*(x[run_X] for x in runs), begin_X, end_X, part_X], axis=1)

        merged = np.flatnonzero(num_parts_N > 1)
        merges_J8 = np.zeros((self.max_merges, 8), np.int32)
        if len(merged):
            num = num_parts_N[merged]
            merges_J8[: len(merged), :4] = np.stack(
                [first_token_N[merged], num_tokens_N[merged], np.cumsum(num) - num, num], axis=1
            )
        return np.concatenate([merges_J8, runs_X8[np.argsort(begin_X - end_X, kind="stable")]])

    def _part_lens(self, num_keys_N: np.ndarray) -> np.ndarray:
        """Keys of a part of each run: so many that all parts together run at the same time."""
        share = max(num_keys_N.sum() / self.num_programs, MIN_PART_KEYS)
        num_parts_N = np.maximum(num_keys_N // share, 1)
        units_N: np.ndarray = np.ceil(num_keys_N / num_parts_N / PART_UNIT).astype(np.int64)
        return units_N * PART_UNIT


def _repeat(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index as often as it counts, and the how manieth it is: [2, 1] gives 0 0 1, 0 1 0."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


def extend_attention(
    q_THE: Tensor,
    keys_SKE: Tensor,
    values_SKE: Tensor,
    pages_RP: Tensor,
    plan_N8: Tensor,
    out_THE: Tensor,
    *,
    num_merges: int,
    num_parts: int,
    page_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    tile: tuple[int, int, int, int] | None = None,
) -> None:
    """Causal attention of the runs' tokens to their requests' tokens up to themselves.

    `plan_N8` is a `RunPlanner`'s; `out_THE` is contiguous.

    num_merges  first rows of the plan: `max_merges`
    num_parts   that there may be, 0 if there are none
    tile        as `choose_tile` gives it; `run_len` of the planner follows from it
    """
    _, H, E = q_THE.shape
    K = keys_SKE.shape[1]
    assert q_THE.stride()[1:] == (E, 1), f"queries of stride {q_THE.stride()} cannot be read"
    assert keys_SKE.is_contiguous(), "the cache must be contiguous"
    assert out_THE.is_contiguous(), "the output must be contiguous"
    tile_rows, block_l, num_warps, num_stages = tile or choose_tile(E, q_THE.dtype)
    run_len, runs_N8 = tile_rows // (H // K), plan_N8[num_merges:]
    block_e = max(16, triton.next_power_of_2(E))
    parts = lse = out_THE
    if num_parts:
        shape = (num_parts, H, run_len)
        parts = torch.empty((*shape, E), dtype=torch.float32, device=q_THE.device)
        lse = torch.empty(shape, dtype=torch.float32, device=q_THE.device)
    _extend_kernel[(len(runs_N8), K)](
        q_THE,
        keys_SKE,
        values_SKE,
        pages_RP,
        runs_N8,
        out_THE,
        parts,
        lse,
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
        BLOCK_E=block_e,
        BLOCK_L=block_l,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_WINDOW=window is not None,
        HAS_PARTS=num_parts > 0,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if num_parts and num_merges:
        _merge_kernel[(num_merges, H, triton.cdiv(run_len, MERGED_ROWS))](
            plan_N8,
            parts,
            lse,
            out_THE,
            H=H,
            E=E,
            L=run_len,
            BLOCK_R=MERGED_ROWS,
            BLOCK_E=block_e,
        )
