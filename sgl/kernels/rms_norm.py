"""RMS norm over the last axis: y = x / sqrt(mean(x^2) + eps) * weight, computed in float32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm of every row, in the type of `x_TD`."""
    _check(x_TD, weight_D)
    if x_TD.device.type == "cuda":
        from sgl.kernels import triton_rms_norm

        return triton_rms_norm.rms_norm(x_TD, weight_D, eps)
    return rms_norm_reference(x_TD, weight_D, eps)


def add_rms_norm(stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Add `delta_TD` to `stream_TD` in place; returns the norm of the sum."""
    _check(stream_TD, weight_D)
    assert delta_TD.shape == stream_TD.shape, f"{delta_TD.shape} is not {stream_TD.shape}"
    if stream_TD.device.type == "cuda":
        from sgl.kernels import triton_rms_norm

        return triton_rms_norm.add_rms_norm(stream_TD, delta_TD, weight_D, eps)
    return add_rms_norm_reference(stream_TD, delta_TD, weight_D, eps)


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    # On a CPU the number of operations is what a row costs, and temporaries what many cost: this
    # has half of what the textbook formula has of both
    y_TD = x_TD.to(torch.float32, copy=True)
    length_T1 = torch.linalg.vector_norm(y_TD, dim=-1, keepdim=True)
    mean_T1 = torch.addcmul(
        _scalar(eps, x_TD.device), length_T1, length_T1, value=1 / x_TD.shape[1]
    )
    return y_TD.mul_(mean_T1.rsqrt_()).mul_(weight_D).to(x_TD.dtype)


def add_rms_norm_reference(
    stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float
) -> Tensor:
    return rms_norm_reference(stream_TD.add_(delta_TD), weight_D, eps)


@cache
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def _check(x_TD: Tensor, weight_D: Tensor) -> None:
    assert x_TD.shape[1:] == weight_D.shape, f"{x_TD.shape} does not end in {weight_D.shape}"
    assert weight_D.dtype == torch.float32, f"the weight of a norm is {weight_D.dtype}"
