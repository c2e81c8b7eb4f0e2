"""RMS norm in Triton: one program a row, the row in registers.

Axes: T rows    D numbers of a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options


@triton.jit
def _rms_norm_kernel(
    stream,  # [T, D], contiguous
    delta,  # [T, D], added to the stream in place; unused without HAS_DELTA
    weight,  # [D] float32
    out,  # [T, D]
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK_D)
    is_real = d < D
    x = tl.load(stream + row + d, mask=is_real, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + row + d, mask=is_real, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        tl.store(stream + row + d, x, mask=is_real)
    y = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, axis=0) / D + eps)
    w = tl.load(weight + d, mask=is_real, other=0.0)
    tl.store(out + row + d, (y * scale * w).to(out.dtype.element_ty), mask=is_real)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm of every row, in the type of `x_TD`."""
    return _launch(x_TD, None, weight_D, eps)


def add_rms_norm(stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Add `delta_TD` to `stream_TD` in place; returns the norm of the sum."""
    return _launch(stream_TD, delta_TD, weight_D, eps)


def _launch(stream_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
    assert stream_TD.is_contiguous(), "rows must lie end to end"
    T, D = stream_TD.shape
    out_TD = torch.empty_like(stream_TD)
    if T:
        block = triton.next_power_of_2(D)
        _rms_norm_kernel[(T,)](
            stream_TD,
            delta_TD.contiguous() if delta_TD is not None else stream_TD,
            weight_D,
            out_TD,
            eps,
            D=D,
            BLOCK_D=block,
            HAS_DELTA=delta_TD is not None,
            num_warps=min(max(block // 512, 1), 16),
            **launch_options(stream_TD.device),
        )
    return out_TD
