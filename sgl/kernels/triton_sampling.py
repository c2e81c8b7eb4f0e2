"""Sampling in Triton without a sort; see sampling.py for what it does.

    part by part   best token and mass of 2048 logits
    part by part   how many tokens lie how deep below the row's best
    part by part   a list of the tokens which may be kept: these depths tell which cannot
    row by row     the draw, from the list (triton_draw.py)

Each line is a launch; rows that are greedy or draw from everything pass over the middle two.
Depths are counted in bins, fine where much mass is and coarse where little is. A bin's tokens
cannot be kept when those above are k or more, or when those in it and below hold less than 1 - p.

Axes: B rows with logits    V vocabulary    X parts of the vocabulary    H bins    C candidates
      R, N the sampling table
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options
from sgl.kernels.sampling_table import SamplingTable
from sgl.kernels.triton_draw import (
    draw_kernel,
    has_limit,
    load_limits,
    pack_key,
    part_masses,
    weight,
)

BLOCK_V = 2048
MAX_LISTED = 8192  # candidates; rows with more (flat ones) are searched as a whole, which is slow
NUM_PROGRAMS = 1024  # if rows have so many parts: each learns much before it reads one
CHUNK = 1024  # candidates that the draw of most rows looks at
NUM_BINS = 128
# bin = 10 * sqrt(depth in bits): the last bin begins at 161 bits, where a float32 weight is zero
BINS_PER_ROOT = tl.constexpr(10.0)


@triton.jit
def _summarise_kernel(
    logits,  # [B, V]
    rows,  # [B]
    numbers,  # [R, N]
    best,  # [B, X]
    best_ids,  # [B, X]
    sums,  # [B, X]: mass of the part relative to its best token's
    bins,  # [B, H]: made zero
    num_keys,  # [B]: made zero
    V,
    N: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    limits = load_limits(numbers, tl.load(rows + b), N)
    v = part * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits + b * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))  # what is not a number wins, and is seen to be infinite
    value = tl.max(x, axis=0)
    tl.store(best + b * NUM_PARTS + part, value)
    index = tl.min(tl.where(x == value, v, 0x7FFFFFFF), axis=0)
    tl.store(best_ids + b * NUM_PARTS + part, index)
    is_number = (value < float("inf")) & (value > float("-inf"))
    x = tl.where(is_number, x, float("-inf"))
    w = weight(x, tl.where(is_number, value, 0.0), limits)
    tl.store(sums + b * NUM_PARTS + part, tl.sum(w, axis=0))
    if part == 0:
        tl.store(bins + b * NUM_BINS + tl.arange(0, NUM_BINS), tl.zeros([NUM_BINS], tl.int32))
        tl.store(num_keys + b, 0)


@triton.jit
def _best_of_row(best, b, NUM_PARTS: tl.constexpr, BLOCK_X: tl.constexpr):
    part = tl.arange(0, BLOCK_X)
    is_real = part < NUM_PARTS
    part_best = tl.load(best + b * NUM_PARTS + part, mask=is_real, other=float("-inf"))
    return tl.max(part_best, axis=0)


@triton.jit
def _bin_of(x, row_best, limits, NUM_BINS: tl.constexpr):
    depth = (row_best - x) * limits.scale
    return tl.minimum(tl.sqrt(depth) * BINS_PER_ROOT, NUM_BINS - 1.0).to(tl.int32)


@triton.jit
def _count_kernel(
    logits,  # [B, V]
    rows,  # [B]
    numbers,  # [R, N]
    best,  # [B, X]
    bins,  # [B, H]
    V,
    N: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_V: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    limits = load_limits(numbers, tl.load(rows + b), N)
    if (limits.top_k > 1) & ((limits.top_k < V) | (limits.top_p < 1.0)):
        row_best = _best_of_row(best, b, NUM_PARTS, BLOCK_X)
        if (row_best < float("inf")) & (row_best > float("-inf")):
            counts = tl.zeros([NUM_BINS], tl.int32)
            for part in range(tl.program_id(1), NUM_PARTS, tl.num_programs(1)):
                v = part * BLOCK_V + tl.arange(0, BLOCK_V)
                x = tl.load(logits + b * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
                counts += tl.histogram(_bin_of(x, row_best, limits, NUM_BINS), NUM_BINS)
            h = tl.arange(0, NUM_BINS)
            is_counted = (counts > 0) & (h < NUM_BINS - 1)  # the last bin's have no weight
            tl.atomic_add(bins + b * NUM_BINS + h, counts, mask=is_counted, sem="relaxed")


@triton.jit
def _num_open_bins(bins, total, limits, NUM_BINS: tl.constexpr):
    """How many bins have tokens which may be kept."""
    h = tl.arange(0, NUM_BINS)
    counts_H = tl.load(bins + h)
    above_H = tl.cumsum(counts_H, axis=0) - counts_H
    num_open = tl.sum((above_H < limits.top_k).to(tl.int32), axis=0)
    if limits.top_p < 1.0:
        edges_H = h.to(tl.float32) / BINS_PER_ROOT
        masses_H = counts_H.to(tl.float64) * tl.exp2(-edges_H * edges_H).to(tl.float64)  # at most
        rest_H = tl.sum(masses_H, axis=0) - (tl.cumsum(masses_H, axis=0) - masses_H)
        dropped = (1.0 - limits.top_p - 1e-6) * 0.999 * total  # float32 weights are rounded
        num_open = tl.minimum(num_open, tl.sum((rest_H >= dropped).to(tl.int32), axis=0))
    return num_open


@triton.jit
def _list_kernel(
    logits,  # [B, V]
    rows,  # [B]
    numbers,  # [R, N]
    best,  # [B, X]
    sums,  # [B, X]
    bins,  # [B, H]
    keys,  # [B, C]: in any order
    num_keys,  # [B]
    V,
    N: tl.constexpr,
    C: tl.constexpr,
    ID_BITS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_V: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    limits = load_limits(numbers, tl.load(rows + b), N)
    if (limits.top_k > 1) & has_limit(limits, V):
        row_best = _best_of_row(best, b, NUM_PARTS, BLOCK_X)
        if (row_best < float("inf")) & (row_best > float("-inf")):
            masses_X = part_masses(best, sums, b, row_best, limits, NUM_PARTS, BLOCK_X)
            total = tl.sum(masses_X, axis=0)
            num_open = _num_open_bins(bins + b * NUM_BINS, total, limits, NUM_BINS)
            for part in range(tl.program_id(1), NUM_PARTS, tl.num_programs(1)):
                part_best = tl.load(best + b * NUM_PARTS + part)
                if _bin_of(part_best, row_best, limits, NUM_BINS) < num_open:
                    v = part * BLOCK_V + tl.arange(0, BLOCK_V)
                    x = tl.load(logits + b * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
                    w = weight(x, row_best, limits)
                    is_listed = (w > 0.0) & (w >= limits.min_p)
                    is_listed &= _bin_of(x, row_best, limits, NUM_BINS) < num_open
                    ones = is_listed.to(tl.int32)
                    first = tl.atomic_add(num_keys + b, tl.sum(ones, axis=0), sem="relaxed")
                    at = first + tl.cumsum(ones, axis=0) - ones
                    is_listed &= at < C
                    tl.store(keys + b * C + at, pack_key(x, v, ID_BITS), mask=is_listed)


def sample_tokens(
    logits_BV: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    table: SamplingTable,
    last_token_R: Tensor,
) -> Tensor:
    B, V = logits_BV.shape
    assert logits_BV.is_contiguous(), "the logits must be contiguous"
    assert table.numbers_RN.is_contiguous(), "the table must be contiguous"
    num_parts = triton.cdiv(V, BLOCK_V)
    device = logits_BV.device
    best = torch.empty((B, num_parts), dtype=torch.float32, device=device)
    sums = torch.empty_like(best)
    best_ids = torch.empty((B, num_parts), dtype=torch.int32, device=device)
    bins = torch.empty((B, NUM_BINS), dtype=torch.int32, device=device)
    keys = torch.empty((B, MAX_LISTED), dtype=torch.int64, device=device)
    num_keys = torch.empty(B, dtype=torch.int32, device=device)
    token_ids_B = torch.empty(B, dtype=torch.int64, device=device)
    if not B:
        return token_ids_B
    numbers = table.numbers_RN
    sizes = {"N": numbers.shape[1], "NUM_PARTS": num_parts, "BLOCK_V": BLOCK_V}
    sizes |= launch_options(device)
    all_parts = {"BLOCK_X": triton.next_power_of_2(num_parts)}
    listing = {"C": MAX_LISTED, "ID_BITS": V.bit_length()}
    _summarise_kernel[(B, num_parts)](
        logits_BV, rows_B, numbers, best, best_ids, sums, bins, num_keys, V,
        NUM_BINS=NUM_BINS, num_warps=4, **sizes,
    )  # fmt: skip
    programs_per_row = min(num_parts, triton.cdiv(NUM_PROGRAMS, B))
    _count_kernel[(B, programs_per_row)](
        logits_BV, rows_B, numbers, best, bins, V,
        NUM_BINS=NUM_BINS, num_warps=8, **all_parts, **sizes,
    )  # fmt: skip
    _list_kernel[(B, programs_per_row)](
        logits_BV, rows_B, numbers, best, sums, bins, keys, num_keys, V,
        NUM_BINS=NUM_BINS, num_warps=8, **listing, **all_parts, **sizes,
    )  # fmt: skip
    draw_kernel[(B,)](
        logits_BV, best, best_ids, sums, keys, num_keys, rows_B, positions_B, numbers,
        table.seed_R, token_ids_B, last_token_R, V,
        CHUNK=CHUNK, num_warps=16, **listing, **all_parts, **sizes,
    )  # fmt: skip
    return token_ids_B
