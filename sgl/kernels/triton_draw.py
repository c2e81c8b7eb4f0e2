"""The draw itself, in Triton: one program for a row, which sorts nothing.

Tokens are ranked by a key of 64 bits that no two share: the logit above, the id below. Which are
kept and which is drawn are two searches of one kind: for a bound such that the keys above it are
those before whose turn fewer than a count and at most a mass have come. Each guess at the bound is
a pass over the candidates; a search ends when a single key could still lie on either side. Masses
are relative to the best token's and summed in float64, so the order of candidates changes nothing.

Axes: B rows with logits    V vocabulary    C candidates    X parts of the vocabulary
      R, N the sampling table
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sgl.kernels import sampling_table

TEMPERATURE = tl.constexpr(sampling_table.TEMPERATURE)
TOP_K = tl.constexpr(sampling_table.TOP_K)
TOP_P = tl.constexpr(sampling_table.TOP_P)
MIN_P = tl.constexpr(sampling_table.MIN_P)
LOG2_E = tl.constexpr(1.4426950408889634)
NO_KEY = tl.constexpr(-(2**63))
NO_TOKEN = tl.constexpr(2**31 - 1)


class Limits(NamedTuple):
    """What a row draws with; of values in a kernel, as the next one is."""

    scale: tl.tensor  # of exponents of 2
    top_k: tl.tensor
    top_p: tl.tensor
    min_p: tl.tensor


class Candidates(NamedTuple):
    """Where a row's candidates are: `num` keys, or `num` logits that are made keys when read."""

    entries: tl.tensor
    num: tl.tensor
    best: tl.tensor  # the largest logit
    limits: Limits


@triton.jit
def load_limits(numbers, row, N: tl.constexpr):
    mine = numbers + row.to(tl.int64) * N
    top_k = tl.load(mine + TOP_K).to(tl.int32)
    scale = LOG2_E / tl.load(mine + TEMPERATURE)
    return Limits(scale, top_k, tl.load(mine + TOP_P), tl.load(mine + MIN_P))


@triton.jit
def has_limit(limits, V):
    """Whether a row that is not greedy may draw only some of the tokens."""
    return (limits.top_k < V) | (limits.top_p < 1.0) | (limits.min_p > 0.0)


@triton.jit
def weight(x, best, limits):
    """Mass of a token relative to the best one's."""
    return tl.exp2((x - best) * limits.scale)


@triton.jit
def part_masses(best, sums, b, row_best, limits, NUM_PARTS: tl.constexpr, BLOCK_X: tl.constexpr):
    """What each part of the vocabulary holds, relative to the row's best token: float64 [X]."""
    part = tl.arange(0, BLOCK_X)
    is_real = part < NUM_PARTS
    part_best = tl.load(best + b * NUM_PARTS + part, mask=is_real, other=float("-inf"))
    part_sum = tl.load(sums + b * NUM_PARTS + part, mask=is_real, other=0.0)
    return (part_sum * weight(part_best, row_best, limits)).to(tl.float64)


@triton.jit
def pack_key(x, token, ID_BITS: tl.constexpr):
    """The larger the logit the larger the key; of equal ones the first has the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 is equal to 0.0
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (rank << ID_BITS) | ((1 << ID_BITS) - 1 - token)


@triton.jit
def _logit_of(key, ID_BITS: tl.constexpr):
    rank = (key >> ID_BITS).to(tl.int32)
    return tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank).to(tl.float32, bitcast=True)


@triton.jit
def _load_keys(
    candidates, start, ID_BITS: tl.constexpr, ARE_KEYS: tl.constexpr, CHUNK: tl.constexpr
):
    i = start + tl.arange(0, CHUNK)
    is_real = i < candidates.num
    if ARE_KEYS:
        keys = tl.load(candidates.entries + i, mask=is_real, other=NO_KEY)
    else:
        x = tl.load(candidates.entries + i, mask=is_real, other=float("-inf")).to(tl.float32)
        w = weight(x, candidates.best, candidates.limits)
        is_candidate = (w > 0.0) & (w >= candidates.limits.min_p)
        keys = tl.where(is_candidate, pack_key(x, i, ID_BITS), NO_KEY)
    return keys


@triton.jit
def _sum_above(
    candidates, bound, ID_BITS: tl.constexpr, ARE_KEYS: tl.constexpr, CHUNK: tl.constexpr
):
    """How many keys are above a bound, and their mass."""
    counts = tl.zeros([CHUNK], tl.int32)
    masses = tl.zeros([CHUNK], tl.float64)
    for start in range(0, candidates.num, CHUNK):
        keys = _load_keys(candidates, start, ID_BITS, ARE_KEYS, CHUNK)
        is_above = keys > bound
        counts += is_above.to(tl.int32)
        x = tl.where(is_above, _logit_of(keys, ID_BITS), float("-inf"))
        masses += weight(x, candidates.best, candidates.limits).to(tl.float64)
    return tl.sum(counts, axis=0), tl.sum(masses, axis=0)


@triton.jit
def _lowest_above(
    candidates, bound, ID_BITS: tl.constexpr, ARE_KEYS: tl.constexpr, CHUNK: tl.constexpr
):
    lowest = tl.full([CHUNK], 2**63 - 1, tl.int64)
    for start in range(0, candidates.num, CHUNK):
        keys = _load_keys(candidates, start, ID_BITS, ARE_KEYS, CHUNK)
        lowest = tl.where(keys > bound, tl.minimum(keys, lowest), lowest)
    return tl.min(lowest, axis=0)


@triton.jit
def _find_bound(
    candidates,
    low,
    high,
    max_count,
    max_mass,
    ID_BITS: tl.constexpr,
    ARE_KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A bound above which lie, of the keys above `low`, those before whose turn fewer than
    `max_count` and at most `max_mass` have come; how many these are, and their mass.

    high  the best key
    """
    count, mass = _sum_above(candidates, low, ID_BITS, ARE_KEYS, CHUNK)
    count_high = 0
    while count - count_high > 1:  # the keys at or below `high` and above `low` are undecided
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        num_above, mass_above = _sum_above(candidates, middle, ID_BITS, ARE_KEYS, CHUNK)
        if (num_above < max_count) & (mass_above <= max_mass):
            high = middle
            count_high = num_above
        else:
            low = middle
            count = num_above
            mass = mass_above
    return low, count, mass


@triton.jit
def _draw_kept(
    candidates,
    best_key,
    uniform,
    max_mass,
    ID_BITS: tl.constexpr,
    ARE_KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The token drawn from those within the row's limits, by rank."""
    top_k = candidates.limits.top_k
    low = _lowest_above(candidates, NO_KEY, ID_BITS, ARE_KEYS, CHUNK) - 1
    low, num_kept, mass = _find_bound(
        candidates, low, best_key, top_k, max_mass, ID_BITS, ARE_KEYS, CHUNK
    )
    low, _, _ = _find_bound(
        candidates, low, best_key, num_kept, uniform * mass, ID_BITS, ARE_KEYS, CHUNK
    )
    drawn = _lowest_above(candidates, low, ID_BITS, ARE_KEYS, CHUNK)
    ID_MASK: tl.constexpr = (1 << ID_BITS) - 1
    return (ID_MASK - (drawn & ID_MASK)).to(tl.int32)


@triton.jit
def _draw_any(logits, masses_X, row_best, uniform, limits, V, BLOCK_V: tl.constexpr,
              BLOCK_X: tl.constexpr):  # fmt: skip
    """The token drawn from the whole vocabulary, by id: first its part, then itself."""
    parts = tl.arange(0, BLOCK_X)
    ends_X = tl.cumsum(masses_X, axis=0)
    target = uniform * tl.max(ends_X, axis=0)
    is_passed = (ends_X > target) & (masses_X > 0.0)
    part = tl.min(tl.where(is_passed, parts, NO_TOKEN), axis=0)
    # sums are rounded: where none passes the target, it is the last that holds anything
    part = tl.minimum(part, tl.max(tl.where(masses_X > 0.0, parts, 0), axis=0))
    rest = target - tl.sum(tl.where(parts == part, ends_X - masses_X, 0.0), axis=0)

    v = part * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
    w = weight(x, row_best, limits)
    ends = tl.cumsum(w.to(tl.float64), axis=0)
    token = tl.min(tl.where((ends > rest) & (w > 0.0), v, NO_TOKEN), axis=0)
    return tl.minimum(token, tl.max(tl.where(w > 0.0, v, 0), axis=0))


@triton.jit
def _uniform(seed, position):
    """As `uniform` in sampling.py."""
    x = seed.to(tl.uint64) + (position.to(tl.int64) + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2 ** -53


@triton.jit
def draw_kernel(
    logits,  # [B, V]
    best,  # [B, X]
    best_ids,  # [B, X]
    sums,  # [B, X]
    keys,  # [B, C]
    num_keys,  # [B]: of all candidates, more than C of which there is no list
    rows,  # [B]
    positions,  # [B]
    numbers,  # [R, N]
    seeds,  # [R]
    token_ids,  # [B]
    last_token,  # [R]
    V,
    N: tl.constexpr,
    C: tl.constexpr,
    ID_BITS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + b)
    limits = load_limits(numbers, row, N)
    part = tl.arange(0, BLOCK_X)
    is_real = part < NUM_PARTS
    part_best = tl.load(best + b * NUM_PARTS + part, mask=is_real, other=float("-inf"))
    part_ids = tl.load(best_ids + b * NUM_PARTS + part, mask=is_real, other=NO_TOKEN)
    row_best = tl.max(part_best, axis=0)
    token = tl.min(tl.where(part_best == row_best, part_ids, NO_TOKEN), axis=0)
    is_number = (row_best < float("inf")) & (row_best > float("-inf"))
    if is_number & (limits.top_k > 1):
        uniform = _uniform(tl.load(seeds + row), tl.load(positions + b))
        masses_X = part_masses(best, sums, b, row_best, limits, NUM_PARTS, BLOCK_X)
        mine = logits + b * V
        if has_limit(limits, V):
            num = tl.load(num_keys + b)
            max_mass = limits.top_p.to(tl.float64) * tl.sum(masses_X, axis=0)
            max_mass = tl.where(limits.top_p < 1.0, max_mass, float("inf"))
            key = pack_key(row_best, token, ID_BITS)
            listed = Candidates(keys + b * C, num, row_best, limits)
            if num <= CHUNK:
                token = _draw_kept(listed, key, uniform, max_mass, ID_BITS, True, CHUNK)
            elif num <= C:
                token = _draw_kept(listed, key, uniform, max_mass, ID_BITS, True, C)
            else:
                whole = Candidates(mine, V, row_best, limits)
                token = _draw_kept(whole, key, uniform, max_mass, ID_BITS, False, C)
        else:
            token = _draw_any(mine, masses_X, row_best, uniform, limits, V, BLOCK_V, BLOCK_X)
    tl.store(token_ids + b, tl.where(is_number, token, -1).to(tl.int64))
    tl.store(last_token + row, tl.where(is_number, token, 0).to(tl.int64))
