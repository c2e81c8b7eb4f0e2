"""The gate of a SwiGLU: y = silu(gate) * up, the two side by side in the last axis."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[T, 2F] to [T, F]."""
    assert gate_up.shape[-1] % 2 == 0, f"{gate_up.shape} cannot be halved"
    if gate_up.device.type == "cuda":
        from sgl.kernels import triton_silu_and_mul

        return triton_silu_and_mul.silu_and_mul(gate_up)
    return silu_and_mul_reference(gate_up)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)
