"""One row times a matrix in Triton: nothing but reading the weight, as fast as memory gives it.

Axes: I inputs    O outputs
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gemv_kernel(
    x,  # [I]
    weight,  # [O, I]
    out,  # [O]
    O,
    I,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = weight + o.to(tl.int64)[:, None] * I
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, I, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        x_I = tl.load(x + i, mask=i < I, other=0.0).to(tl.float32)
        is_real = (o < O)[:, None] & (i < I)[None, :]
        w_OI = tl.load(row + i[None, :], mask=is_real, other=0.0)
        acc += w_OI.to(tl.float32) * x_I[None, :]
    y = tl.sum(acc, axis=1)
    tl.store(out + o, y.to(out.dtype.element_ty), mask=o < O)


def gemv(
    x_1I: Tensor,
    weight_OI: Tensor,
    dtype: torch.dtype,
    *,
    block_o: int | None = None,
    block_i: int | None = None,
    num_warps: int = 4,
) -> Tensor:
    """x @ weight.T: [1, O] in `dtype`."""
    O, I = weight_OI.shape
    out_1O = torch.empty((1, O), dtype=dtype, device=x_1I.device)
    block_o = block_o or _block_o(O)
    block_i = block_i or min(triton.next_power_of_2(I), 512)
    _gemv_kernel[(triton.cdiv(O, block_o),)](
        x_1I, weight_OI, out_1O, O, I, BLOCK_O=block_o, BLOCK_I=block_i, num_warps=num_warps
    )
    return out_1O


def _block_o(num_out: int) -> int:
    """Outputs a program computes: more of them share what is read of `x`, fewer fill the device."""
    return 16 if num_out >= 65536 else 8 if num_out >= 16384 else 4
