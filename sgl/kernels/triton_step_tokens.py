"""The small kernels between two steps, in Triton; see step_tokens.py for what they do."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.collectives import TensorParallel
from sgl.kernels.pdl import launch_options

BLOCK_T = 128
BLOCK_V = 2048


@triton.jit(do_not_specialize=["T"])
def _take_tokens_kernel(
    inputs,  # [4, T]
    last_token,  # [R]
    pages,  # [R, P]
    token_ids,  # [T]
    T,
    input_row_len,
    page_row_len,
    PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_real = t < T
    row = tl.load(inputs + t, mask=is_real, other=0).to(tl.int64)
    position = tl.load(inputs + input_row_len + t, mask=is_real, other=0)
    slot = tl.load(inputs + 2 * input_row_len + t, mask=is_real, other=0)
    token = tl.load(inputs + 3 * input_row_len + t, mask=is_real, other=0).to(tl.int64)
    tl.store(pages + row * page_row_len + position // PAGE_SIZE, slot // PAGE_SIZE, mask=is_real)
    last = tl.load(last_token + row, mask=is_real, other=0)
    tl.store(token_ids + t, tl.where(token < 0, last, token), mask=is_real)


@triton.jit
def _best_of_part_kernel(
    logits,  # [B, V]
    best,  # [B, X]: the largest logit of a part, and its id in the lower half of the word
    V,
    first_id,
    NUM_PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    v = part * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))  # what is not a number wins, and is seen to be infinite
    value = tl.max(x, axis=0)
    index = first_id + tl.min(tl.where(x == value, v, 0x7FFFFFFF), axis=0)
    bits = value.to(tl.int32, bitcast=True).to(tl.int64)
    tl.store(best + row * NUM_PARTS + part, (bits << 32) | index.to(tl.int64))


@triton.jit
def _best_of_all_kernel(
    best,  # [B, X], of all ranks
    token_ids,  # [B]
    rows,  # [B]
    last_token,  # [R]
    NUM_PARTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_X)
    is_real = part < NUM_PARTS
    word = tl.load(best + row * NUM_PARTS + part, mask=is_real, other=0)
    x = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    x = tl.where(is_real, x, float("-inf"))
    ids = tl.where(is_real, word.to(tl.int32), 0x7FFFFFFF)
    value = tl.max(x, axis=0)
    token = tl.min(tl.where(x == value, ids, 0x7FFFFFFF), axis=0)
    is_number = (value < float("inf")) & (value > float("-inf"))
    tl.store(token_ids + row, tl.where(is_number, token, -1).to(tl.int64))
    tl.store(last_token + tl.load(rows + row), tl.where(is_number, token, 0).to(tl.int64))


def take_tokens(
    inputs_4T: Tensor, last_token_R: Tensor, pages_RP: Tensor, page_size: int
) -> Tensor:
    T = inputs_4T.shape[1]
    assert inputs_4T.stride(1) == 1, "the inputs' rows must be contiguous"
    token_ids_T = torch.empty(T, dtype=torch.int64, device=inputs_4T.device)
    _take_tokens_kernel[(triton.cdiv(T, BLOCK_T),)](
        inputs_4T,
        last_token_R,
        pages_RP,
        token_ids_T,
        T,
        inputs_4T.stride(0),
        pages_RP.stride(0),
        PAGE_SIZE=page_size,
        BLOCK_T=BLOCK_T,
        num_warps=1,
        **launch_options(inputs_4T.device),
    )
    return token_ids_T


def best_tokens(
    logits_BV: Tensor, rows_B: Tensor, last_token_R: Tensor, tp: TensorParallel
) -> Tensor:
    B, V = logits_BV.shape
    assert logits_BV.is_contiguous(), "the logits must be contiguous"
    num_parts = triton.cdiv(V, BLOCK_V)
    best = torch.empty((B, num_parts), dtype=torch.int64, device=logits_BV.device)
    token_ids_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    if B:
        options = launch_options(logits_BV.device)
        _best_of_part_kernel[(B, num_parts)](
            logits_BV,
            best,
            V,
            tp.rank * V,
            NUM_PARTS=num_parts,
            BLOCK_V=BLOCK_V,
            num_warps=4,
            **options,
        )
        _best_of_all_kernel[(B,)](
            tp.all_gather_last(best),
            token_ids_B,
            rows_B,
            last_token_R,
            NUM_PARTS=tp.size * num_parts,
            BLOCK_X=triton.next_power_of_2(tp.size * num_parts),
            num_warps=1,
            **options,
        )
    return token_ids_B
