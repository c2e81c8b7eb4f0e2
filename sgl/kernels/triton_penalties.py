"""Penalties in Triton; see penalties.py for what they do. Rows without any are not even read.

Axes: B rows with logits    V vocabulary    R, N the sampling table
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels import sampling_table
from sgl.kernels.pdl import launch_options
from sgl.kernels.sampling_table import SamplingTable

FREQUENCY = tl.constexpr(sampling_table.FREQUENCY)
PRESENCE = tl.constexpr(sampling_table.PRESENCE)
REPETITION = tl.constexpr(sampling_table.REPETITION)
BLOCK_V = 2048
BLOCK_B = 128


@triton.jit
def _apply_penalties_kernel(
    logits,  # [B, V]
    rows,  # [B]
    numbers,  # [R, N]
    output_counts,  # [R, V]
    is_in_prompt,  # [R, V]
    V,
    N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    frequency = tl.load(numbers + row * N + FREQUENCY)
    presence = tl.load(numbers + row * N + PRESENCE)
    repetition = tl.load(numbers + row * N + REPETITION)
    if (frequency != 0.0) | (presence != 0.0) | (repetition != 1.0):
        v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        is_real = v < V
        mine = logits + tl.program_id(0).to(tl.int64) * V + v
        x = tl.load(mine, mask=is_real, other=0.0)
        count = tl.load(output_counts + row * V + v, mask=is_real, other=0)
        is_prompt = tl.load(is_in_prompt + row * V + v, mask=is_real, other=0) != 0
        y = tl.where(x > 0.0, x / repetition, x * repetition)
        y = tl.where((count > 0) | is_prompt, y, x)
        y -= frequency * count.to(tl.float32)
        y -= tl.where(count > 0, presence, 0.0)
        tl.store(mine, y, mask=is_real & ((count > 0) | is_prompt))


@triton.jit(do_not_specialize=["B"])
def _count_tokens_kernel(
    token_ids,  # [B]
    rows,  # [B]
    numbers,  # [R, N]
    output_counts,  # [R, V]
    B,
    V,
    N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_real = b < B
    row = tl.load(rows + b, mask=is_real, other=0).to(tl.int64)
    is_penalised = tl.load(numbers + row * N + FREQUENCY, mask=is_real, other=0.0) != 0.0
    is_penalised |= tl.load(numbers + row * N + PRESENCE, mask=is_real, other=0.0) != 0.0
    is_penalised |= tl.load(numbers + row * N + REPETITION, mask=is_real, other=1.0) != 1.0
    token = tl.maximum(tl.load(token_ids + b, mask=is_real, other=0), 0)
    count = output_counts + row * V + token
    is_penalised &= is_real
    tl.store(count, tl.load(count, mask=is_penalised, other=0) + 1, mask=is_penalised)


def apply_penalties(
    logits_BV: Tensor,
    rows_B: Tensor,
    table: SamplingTable,
    output_counts_RV: Tensor,
    is_in_prompt_RV: Tensor,
) -> None:
    B, V = logits_BV.shape
    assert logits_BV.is_contiguous(), "the logits must be contiguous"
    if B:
        _apply_penalties_kernel[(B, triton.cdiv(V, BLOCK_V))](
            logits_BV,
            rows_B,
            table.numbers_RN,
            output_counts_RV,
            is_in_prompt_RV,
            V,
            N=table.numbers_RN.shape[1],
            BLOCK_V=BLOCK_V,
            num_warps=4,
            **launch_options(logits_BV.device),
        )


def count_tokens(
    token_ids_B: Tensor, rows_B: Tensor, table: SamplingTable, output_counts_RV: Tensor
) -> None:
    B = len(token_ids_B)
    if B:
        _count_tokens_kernel[(triton.cdiv(B, BLOCK_B),)](
            token_ids_B,
            rows_B,
            table.numbers_RN,
            output_counts_RV,
            B,
            output_counts_RV.shape[1],
            N=table.numbers_RN.shape[1],
            BLOCK_B=BLOCK_B,
            num_warps=4,
            **launch_options(token_ids_B.device),
        )
