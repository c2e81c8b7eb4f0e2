"""One row times a matrix in Triton: nothing but reading the weight, as fast as memory gives it.

Axes: I inputs    O outputs
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options

PROGRAMS_AT_ONCE = 132 * 6  # that a Hopper GPU runs, each with 64 threads of 150 registers


@triton.jit
def _prefetch(weight, program, O, I, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """Ask for the first tile of a later program, which will find it in the L2 cache."""
    o = program * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I // 64) * 64  # a cache line of 128 bytes
    row = tl.minimum(o, O - 1).to(tl.int64) * I
    address = weight.to(tl.int64) + 2 * (row[:, None] + tl.minimum(i, I - 1)[None, :])
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.u32 $0, 0;",
        "=r,l",
        [address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _gemv_kernel(
    x,  # [I]
    weight,  # [O, I]
    out,  # [O]
    O,
    I,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    WAVE: tl.constexpr,
    NUM_WAVES_AHEAD: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if tl.program_id(0) < WAVE:
            for wave in tl.static_range(1, NUM_WAVES_AHEAD + 1):
                _prefetch(weight, tl.program_id(0) + wave * WAVE, O, I, BLOCK_O, BLOCK_I)
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


def gemv(
    x_1I: Tensor,
    weight_OI: Tensor,
    dtype: torch.dtype,
    *,
    tile: tuple[int, int, int] | None = None,
    waves_ahead: int = 2,
) -> Tensor:
    """x @ weight.T: [1, O] in `dtype`.

    tile  outputs and inputs that a program holds, and its warps; measured on an H200: few outputs
          and long rows are best for all layers of models with 1 and 8 billion weights
    """
    O, I = weight_OI.shape
    block_o, block_i, num_warps = tile or ((2, 2048, 2) if I >= 4096 else (2, 1024, 4))
    out_1O = torch.empty((1, O), dtype=dtype, device=x_1I.device)
    _gemv_kernel[(triton.cdiv(O, block_o),)](
        x_1I,
        weight_OI,
        out_1O,
        O,
        I,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        WAVE=PROGRAMS_AT_ONCE,
        NUM_WAVES_AHEAD=waves_ahead,
        num_warps=num_warps,
        **launch_options(x_1I.device),
    )
    return out_1O
