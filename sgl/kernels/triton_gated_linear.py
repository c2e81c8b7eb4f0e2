"""A matrix product and the gate of a SwiGLU in one kernel, for many rows (Hopper: TMA, wgmma).

The product of 8192 rows with gate and up of an 8B model is 470 MB, which would be written, read and
written again at half the size. Here a program computes a tile of the gates and the same tile of the
ups, and only their gated product leaves the chip.

    tile (m, n) = silu(x[m] @ gate[n]) * (x[m] @ up[n])        weight: gate above up

Programs are as many as multiprocessors; each takes every so manieth tile, in an order in which
neighbours share rows or weights that are in the L2 cache (grouped, as in Triton's matmul tutorial).

Axes: T rows    D inputs    F gates
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sgl.kernels.multiprocessors import num_cores


class Tile(NamedTuple):
    """Rows, gates and inputs that a program looks at together; how it is compiled."""

    block_t: int = 128
    block_f: int = 128
    block_d: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3


@triton.jit
def _gated_linear_kernel(
    x,  # [T, D]
    weight,  # [2F, D]
    out,  # [T, F]
    T,
    F,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    num_t = tl.cdiv(T, BLOCK_T)
    num_f = tl.cdiv(F, BLOCK_F)
    for tile in tl.range(tl.program_id(0), num_t * num_f, NUM_PROGRAMS, flatten=True):
        group = tile // (GROUP * num_f)
        first_t = group * GROUP
        rows = min(num_t - first_t, GROUP)
        inside = tile % (GROUP * num_f)
        t = (first_t + inside % rows) * BLOCK_T
        f = (inside // rows) * BLOCK_F
        gate_TF = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        up_TF = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        for d in range(0, D, BLOCK_D):
            x_TD = x.load([t, d])
            gate_TF = tl.dot(x_TD, weight.load([f, d]).T, gate_TF)
            up_TF = tl.dot(x_TD, weight.load([F + f, d]).T, up_TF)
        y_TF = gate_TF * tl.sigmoid(gate_TF) * up_TF
        out.store([t, f], y_TF.to(out.dtype))


def gated_linear(x_TD: Tensor, weight_FD: Tensor, tile: Tile = Tile()) -> Tensor:
    """[T, D] and [2F, D] to [T, F]. Rows must lie end to end and be multiples of 16 bytes."""
    (T, D), F = x_TD.shape, weight_FD.shape[0] // 2
    assert x_TD.is_contiguous(), "rows must lie end to end"
    assert weight_FD.is_contiguous(), "rows of the weight must lie end to end"
    out_TF = torch.empty((T, F), dtype=x_TD.dtype, device=x_TD.device)
    num_tiles = triton.cdiv(T, tile.block_t) * triton.cdiv(F, tile.block_f)
    num_programs = min(num_cores(x_TD.device), num_tiles)
    _gated_linear_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(x_TD, [tile.block_t, tile.block_d]),
        TensorDescriptor.from_tensor(weight_FD, [tile.block_f, tile.block_d]),
        TensorDescriptor.from_tensor(out_TF, [tile.block_t, tile.block_f]),
        T,
        F,
        D,
        BLOCK_T=tile.block_t,
        BLOCK_F=tile.block_f,
        BLOCK_D=tile.block_d,
        GROUP=tile.group,
        NUM_PROGRAMS=num_programs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_TF
