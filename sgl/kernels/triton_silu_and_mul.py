"""The gate of a SwiGLU in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options
from sgl.kernels.triton_prefetch import num_bytes, num_programs, prefetch

MAX_AHEAD_BYTES = 8 << 20
BLOCK_F = 1024  # a program holds this many gates: wide loads, and enough programs at one row


@triton.jit
def _silu_and_mul_kernel(
    gate_up,  # [T, 2F]
    out,  # [T, F]
    ahead,  # a weight to prefetch: programs (T, …), (T + 1, …), …
    ahead_bytes,
    T,
    F,
    BLOCK_F: tl.constexpr,
    HAS_AHEAD: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if HAS_AHEAD:
        if tl.program_id(0) >= T:
            part = (tl.program_id(0) - T) * tl.num_programs(1) + tl.program_id(1)
            prefetch(ahead, ahead_bytes, part)
            return
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_real = f < F
    gate = tl.load(gate_up + row * 2 * F + f, mask=is_real).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + f, mask=is_real).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * F + f, y.to(out.dtype.element_ty), mask=is_real)


def silu_and_mul(gate_up: Tensor, ahead: Tensor | None = None) -> Tensor:
    """[T, 2F] to [T, F]; `ahead` is a weight that is read next."""
    assert gate_up.is_contiguous(), "rows must lie end to end"
    T, F = gate_up.shape[0], gate_up.shape[1] // 2
    out_TF = torch.empty((T, F), dtype=gate_up.dtype, device=gate_up.device)
    if T:
        num_blocks = triton.cdiv(F, BLOCK_F)
        num_extra = triton.cdiv(num_programs(ahead, T, MAX_AHEAD_BYTES), num_blocks)
        _silu_and_mul_kernel[(T + num_extra, num_blocks)](
            gate_up,
            out_TF,
            gate_up if ahead is None else ahead,
            num_bytes(ahead),
            T,
            F,
            BLOCK_F=BLOCK_F,
            HAS_AHEAD=num_extra > 0,
            num_warps=4,
            **launch_options(gate_up.device),
        )
    return out_TF
