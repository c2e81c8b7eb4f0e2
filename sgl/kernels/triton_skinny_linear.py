"""A few rows times a matrix in Triton: bound by reading the weight, as a decode step of 2 to 128
requests is.

A program computes some outputs of all rows, from some of the inputs; where there are few outputs,
several programs share them and leave parts of a sum, which the kernel that follows adds. The first
tile of the weight is on its way before the rows are there (pdl.py).

Axes: T rows    I inputs    O outputs    X parts of the sum
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options


class Tile(NamedTuple):
    """Outputs and inputs that a program looks at together, and how it is compiled."""

    block_o: int = 64
    block_i: int = 128
    warps: int = 4
    stages: int = 4


@triton.jit
def _skinny_linear_kernel(
    x,  # [T, I]
    weight,  # [O, I]
    out,  # [X, T, O]
    T,
    O,
    I,
    part_len,  # inputs of a part, whole blocks
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    part = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    i = part * part_len + tl.arange(0, BLOCK_I)
    end = tl.minimum((part + 1) * part_len, I)
    rows_OI = weight + o.to(tl.int64)[:, None] * I + i[None, :]
    is_output = (o < O)[:, None]
    w_OI = tl.load(rows_OI, mask=is_output & (i < end)[None, :], other=0.0)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    x_TI = tl.load(
        x + t[:, None] * I + i[None, :], mask=(t < T)[:, None] & (i < end)[None, :], other=0.0
    )
    acc_OT = tl.dot(w_OI, x_TI.T)
    for start in range(BLOCK_I, part_len, BLOCK_I):
        is_input = (i + start < end)[None, :]
        w_OI = tl.load(rows_OI + start, mask=is_output & is_input, other=0.0)
        x_TI = tl.load(
            x + t[:, None] * I + i[None, :] + start, mask=(t < T)[:, None] & is_input, other=0.0
        )
        acc_OT = tl.dot(w_OI, x_TI.T, acc_OT)
    target_TO = out + (part * T + t).to(tl.int64)[:, None] * O + o[None, :]
    tl.store(target_TO, acc_OT.T.to(out.dtype.element_ty), mask=(t < T)[:, None] & (o < O)[None, :])


def skinny_linear(
    x_TI: Tensor, weight_OI: Tensor, num_parts: int = 1, tile: Tile = Tile()
) -> Tensor:
    """Parts of x @ weight.T: [X, T, O] float32, or [1, T, O] in the type of `x_TI`."""
    (T, I), O = x_TI.shape, len(weight_OI)
    dtype = x_TI.dtype if num_parts == 1 else torch.float32
    out_XTO = torch.empty((num_parts, T, O), dtype=dtype, device=x_TI.device)
    part_len = triton.cdiv(triton.cdiv(I, num_parts), tile.block_i) * tile.block_i
    _skinny_linear_kernel[(triton.cdiv(O, tile.block_o), num_parts)](
        x_TI, weight_OI, out_XTO, T, O, I, part_len,
        BLOCK_T=max(16, triton.next_power_of_2(T)), BLOCK_O=tile.block_o, BLOCK_I=tile.block_i,
        num_warps=tile.warps, num_stages=tile.stages, **launch_options(x_TI.device),
    )  # fmt: skip
    return out_XTO
