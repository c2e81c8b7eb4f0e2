"""A linear product with a row-major weight.

cuBLAS reads the weights of one row at two thirds of a GPU's bandwidth where they are small: there
our own kernel runs; where it chooses badly among its own, the one that was measured to be faster.
See docs/performance.md for the figures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl.kernels.tuned_linear import find_product

MIN_ADDED_ROWS = 256  # from here on, adding in the product saves time


def linear(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """x @ weight.T + bias: [T, O], in `dtype` (float32 or, by default, that of `x_TI`).

    Sums are taken in float32 either way; asking for float32 leaves them unrounded.
    """
    assert x_TI.shape[1] == weight_OI.shape[1], f"{x_TI.shape} does not go with {weight_OI.shape}"
    wanted = dtype or x_TI.dtype
    if x_TI.device.type == "cuda" and x_TI.dtype != torch.float32 and bias_O is None:
        product = find_product(x_TI, weight_OI, wanted)
        if product:
            out_TO = x_TI.new_empty(len(x_TI), len(weight_OI), dtype=wanted)
            product.run(x_TI, weight_OI, out_TO)
            return out_TO
        if len(x_TI) == 1 and weight_OI.is_contiguous():
            from sgl.kernels import triton_gemv

            return triton_gemv.gemv(x_TI, weight_OI, wanted)
        if wanted == torch.float32:
            return torch.mm(x_TI, weight_OI.t(), out_dtype=torch.float32)
    return linear_reference(x_TI, weight_OI, bias_O, wanted)


def can_add_linear(x_TI: Tensor) -> bool:
    """Whether `add_linear` is faster than a product and a norm that adds it: many rows on a GPU."""
    is_16_bit = x_TI.dtype in (torch.float16, torch.bfloat16)
    return x_TI.device.type == "cuda" and is_16_bit and len(x_TI) >= MIN_ADDED_ROWS


def add_linear(stream_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> None:
    """stream += x @ weight.T"""
    product = find_product(x_TI, weight_OI, stream_TO.dtype, is_added=True)
    if product and stream_TO.is_contiguous():
        product.run(x_TI, weight_OI, stream_TO)
        return
    stream_TO.addmm_(x_TI, weight_OI.t())


def linear_reference(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return F.linear(x_TI, weight_OI, bias_O).to(dtype)
