"""What each row of the request table samples with, where kernels can read it.

Axes: R rows    N numbers of a row
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
GREEDY = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0)
TEMPERATURE, TOP_K, TOP_P, MIN_P, FREQUENCY, PRESENCE, REPETITION = range(len(NUMBERS))


@dataclass(frozen=True, slots=True)
class SamplingTable:
    """Tensors on one device; kernels are told rows, so that recorded steps find new values.

    numbers_RN  float32, a column for each of `NUMBERS`; top-k 1 is greedy, the vocabulary's size
                is no limit
    seed_R      int64
    """

    numbers_RN: Tensor
    seed_R: Tensor

    @classmethod
    def greedy(cls, num_rows: int, device: torch.device) -> SamplingTable:
        """A table whose rows all take the likeliest token."""
        numbers_RN = torch.tensor(GREEDY, dtype=torch.float32).repeat(num_rows, 1)
        return cls(numbers_RN.to(device), torch.zeros(num_rows, dtype=torch.int64, device=device))
