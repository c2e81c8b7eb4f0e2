"""The KV tensors: for each layer, keys and values of every slot (slot = page * page_size + offset).

Axes: S slots    K key/value heads    E head size
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sgl.models.batch import AttentionSpec

KV_DTYPES = {"fp8_e5m2": torch.float8_e5m2, "fp8_e4m3": torch.float8_e4m3fn}


def kv_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """The format a --kv-cache-dtype asks for; "auto" is the model's own."""
    return KV_DTYPES.get(name, model_dtype)


class KvCache:
    """Slots start as zeros: padding reads them, and 0 * garbage must not become NaN.

    One page more than can be handed out, `padding_page`, is for what fills a batch up.

    dtype        of the numbers stored: the model's own, or 8 bits
    model_dtype  of the queries that meet them
    """

    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        num_pages: int,
        page_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        model_dtype: torch.dtype | None = None,
    ) -> None:
        self.model_dtype = model_dtype or dtype
        self.padding_page = num_pages
        self.page_size = page_size
        num_slots = (num_pages + 1) * page_size
        shapes = [(num_slots, spec.num_kv_heads, spec.head_dim) for spec in layers]
        self.keys_SKE = [_zeros(shape, dtype, device) for shape in shapes]
        self.values_SKE = [_zeros(shape, dtype, device) for shape in shapes]

    @staticmethod
    def bytes_per_token(layers: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
        return sum(2 * spec.num_kv_heads * spec.head_dim * dtype.itemsize for spec in layers)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU, numpy's zeros: unlike torch's they take no memory before they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
