"""Rotary positions: the frequencies of a model, and the angles of a batch.

Angles are computed once per forward pass, not looked up: that is as fast as a table, exact at
every position, and a table for 128k positions would take 64 MiB.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor, nn

from sgl.kernels.rotary import rotary_angles
from sgl.models.batch import Angles
from sgl.models.config import RopeConfig


class Rotary(nn.Module):
    frequencies_R: Tensor

    def __init__(self, head_dim: int, rope: RopeConfig, device: torch.device) -> None:
        super().__init__()
        frequencies_R = rotary_frequencies(head_dim, rope).to(device)
        self.register_buffer("frequencies_R", frequencies_R, persistent=False)

    def forward(self, positions_T: Tensor) -> Angles:
        return Angles(*rotary_angles(positions_T, self.frequencies_R))


def rotary_frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    """Radians per position of each pair, in float32, on the CPU."""
    exponents_R = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    plain_R = 1.0 / rope.theta**exponents_R
    match rope.scaling:
        case "none":
            return plain_R
        case "linear":
            return plain_R / rope.factor
        case "llama3":
            return _llama3(plain_R, rope)
        case "divided":
            return plain_R / torch.tensor(rope.divisors, device="cpu")
        case _:
            assert_never(rope.scaling)


def _llama3(plain_R: Tensor, rope: RopeConfig) -> Tensor:
    """Share 1 of a fast frequency and share 0 of a slow one is kept, the rest is divided."""
    num_turns_R = rope.original_context_len * plain_R / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept_R = ((num_turns_R - low) / (high - low)).clamp(0.0, 1.0)
    return kept_R * plain_R + (1.0 - kept_R) * plain_R / rope.factor
