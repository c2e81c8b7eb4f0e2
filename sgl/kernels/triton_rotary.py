"""Rotary positions and the store into the KV cache in one pass over a layer's q, k and v.

Axes: T tokens    N = H + 2K heads: queries, keys, values    E head size    S slots of the cache
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options

HEADS_PER_PROGRAM = 4, 16  # of few tokens, so that there are enough programs, and of many
MANY_TOKENS = 256


@triton.jit
def _rotate_and_store_kernel(
    qkv,  # [T, N, E]; query heads are turned in place
    cos,  # [T, E] float32
    sin,  # [T, E] float32, the first half negated
    keys,  # [S, K, E]
    values,  # [S, K, E]
    slots,  # [T]
    qkv_row_len,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two that holds half a head
    BLOCK_N: tl.constexpr,
    LIMIT: tl.constexpr,  # largest number the cache can hold, 0 if any
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    is_real = (n < H + 2 * K) & (e < E // 2)
    source = qkv + token * qkv_row_len + n * E + e
    low = tl.load(source, mask=is_real)
    high = tl.load(source + E // 2, mask=is_real)
    c = tl.load(cos + token * E + E // 2 + e, mask=e < E // 2)
    s = tl.load(sin + token * E + E // 2 + e, mask=e < E // 2)
    low_f, high_f = low.to(tl.float32), high.to(tl.float32)
    turned_low = (low_f * c - high_f * s).to(low.dtype)
    turned_high = (high_f * c + low_f * s).to(low.dtype)
    is_query = is_real & (n < H)
    tl.store(source, turned_low, mask=is_query)
    tl.store(source + E // 2, turned_high, mask=is_query)
    slot = tl.load(slots + token).to(tl.int64)
    is_key = is_real & (n >= H) & (n < H + K)
    if LIMIT > 0:
        turned_low = tl.clamp(turned_low.to(tl.float32), -LIMIT, LIMIT)
        turned_high = tl.clamp(turned_high.to(tl.float32), -LIMIT, LIMIT)
        low = tl.clamp(low_f, -LIMIT, LIMIT)
        high = tl.clamp(high_f, -LIMIT, LIMIT)
    key = keys + slot * K * E + (n - H) * E + e
    tl.store(key, turned_low.to(keys.dtype.element_ty), mask=is_key)
    tl.store(key + E // 2, turned_high.to(keys.dtype.element_ty), mask=is_key)
    is_value = is_real & (n >= H + K)
    value = values + slot * K * E + (n - H - K) * E + e
    tl.store(value, low.to(values.dtype.element_ty), mask=is_value)
    tl.store(value + E // 2, high.to(values.dtype.element_ty), mask=is_value)


def rotate_and_store(
    qkv_TNE: Tensor,
    cos_T1E: Tensor,
    sin_T1E: Tensor,
    keys_SKE: Tensor,
    values_SKE: Tensor,
    slots_T: Tensor,
) -> None:
    """Turn the query heads in place; turned keys, and values, go to the cache."""
    T, N, E = qkv_TNE.shape
    K = keys_SKE.shape[1]
    if T:
        block_n = HEADS_PER_PROGRAM[T >= MANY_TOKENS]
        grid = (T, triton.cdiv(N, block_n))
        _rotate_and_store_kernel[grid](
            qkv_TNE,
            cos_T1E,
            sin_T1E,
            keys_SKE,
            values_SKE,
            slots_T,
            qkv_TNE.stride(0),
            H=N - 2 * K,
            K=K,
            E=E,
            BLOCK_E=triton.next_power_of_2(E // 2),
            BLOCK_N=block_n,
            LIMIT=torch.finfo(keys_SKE.dtype).max if keys_SKE.itemsize == 1 else 0.0,
            num_warps=2 if block_n == HEADS_PER_PROGRAM[0] else 4,
            **launch_options(qkv_TNE.device),
        )
