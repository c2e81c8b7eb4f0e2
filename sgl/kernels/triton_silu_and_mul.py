"""The gate of a SwiGLU in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options

BLOCK_F = 1024  # a program holds this many gates: wide loads, and enough programs at one row


@triton.jit
def _silu_and_mul_kernel(gate_up, out, F, BLOCK_F: tl.constexpr, USE_PDL: tl.constexpr):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_real = f < F
    gate = tl.load(gate_up + row * 2 * F + f, mask=is_real).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + f, mask=is_real).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * F + f, y.to(out.dtype.element_ty), mask=is_real)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[T, 2F] to [T, F]."""
    assert gate_up.is_contiguous(), "rows must lie end to end"
    T, F = gate_up.shape[0], gate_up.shape[1] // 2
    out_TF = torch.empty((T, F), dtype=gate_up.dtype, device=gate_up.device)
    if T:
        grid = (T, triton.cdiv(F, BLOCK_F))
        options = launch_options(gate_up.device)
        _silu_and_mul_kernel[grid](gate_up, out_TF, F, BLOCK_F=BLOCK_F, num_warps=4, **options)
    return out_TF
