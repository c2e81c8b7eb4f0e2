"""One row times a matrix in Triton: nothing but reading the weight, as fast as memory gives it.

Axes: I inputs    O outputs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options

TILES = (
    (2, 2048, 2),
    (2, 1024, 4),
    (2, 1024, 1),
    (8, 512, 8),
    (4, 512, 4),
    (4, 1024, 8),
    (1, 4096, 4),
)
"""Outputs and inputs that a program holds, and its warps: the best of 40 for the layers of models
with 1 and 8 billion weights on an H200. Few outputs and long pieces suit large weights best; more
outputs in short pieces suit weights with few, whose programs then fit on the device at once."""


@triton.jit
def _gemv_kernel(
    x,  # [I]
    weight,  # [O, I]
    out,  # [O]
    O,
    I,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    tile = weight + o.to(tl.int64)[:, None] * I + i[None, :]
    w_OI = tl.load(tile, mask=(o < O)[:, None] & (i < I)[None, :], other=0.0)
    if USE_PDL:  # weights never change: their first part is on its way while `x` is computed
        tl.extra.cuda.gdc_wait()
    acc_OI = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, I, BLOCK_I):
        following = start + BLOCK_I + i
        is_real = (o < O)[:, None] & (following < I)[None, :]
        next_w_OI = tl.load(tile + (start + BLOCK_I), mask=is_real, other=0.0)
        x_I = tl.load(x + start + i, mask=start + i < I, other=0.0).to(tl.float32)
        acc_OI += w_OI.to(tl.float32) * x_I[None, :]
        w_OI = next_w_OI
    y_O = tl.sum(acc_OI, axis=1)
    tl.store(out + o, y_O.to(out.dtype.element_ty), mask=o < O)


def gemv(x_1I: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T: [1, O] in `dtype`."""
    O, I = weight_OI.shape
    out_1O = torch.empty((1, O), dtype=dtype, device=x_1I.device)
    Gemv(usual_tile(I)).run(x_1I, weight_OI, out_1O)
    return out_1O


def usual_tile(num_inputs: int) -> tuple[int, int, int]:
    return TILES[0] if num_inputs >= 4096 else TILES[1]


@dataclass(frozen=True, slots=True)
class Gemv:
    """The product with a tile."""

    tile: tuple[int, int, int]

    def run(self, x_1I: Tensor, weight_OI: Tensor, out_1O: Tensor) -> None:
        """out = x @ weight.T; all three are contiguous."""
        O, I = weight_OI.shape
        block_o, block_i, num_warps = self.tile
        _gemv_kernel[(triton.cdiv(O, block_o),)](
            x_1I,
            weight_OI,
            out_1O,
            O,
            I,
            BLOCK_O=block_o,
            BLOCK_I=block_i,
            num_warps=num_warps,
            **launch_options(x_1I.device),
        )
