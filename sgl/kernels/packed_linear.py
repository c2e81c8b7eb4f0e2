"""A linear product on the CPU with a weight that oneDNN has laid out for its own loops.

One to eight rows of bfloat16 read such a weight 1.5 times as fast as a row-major one. oneDNN
compiles a kernel for each number of rows, which takes milliseconds and up to a megabyte that it
keeps for the last thousand. Steps rarely have the same number of tokens, so more than a few rows
are filled up to a multiple: of 500 random sizes the products then take a third of the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_MULTIPLE = 32


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this type on this device have a packed form."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack(weight_OI: Tensor) -> Tensor:
    """An opaque copy of the weight; `packed_linear` and `unpack` can read it."""
    assert can_pack(weight_OI.device, weight_OI.dtype), f"{weight_OI.dtype} cannot be packed"
    packed_OI: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 1)
    return packed_OI


def unpack(packed_OI: Tensor) -> Tensor:
    """The weight as it was packed: the layout changes, the numbers do not."""
    weight_OI: Tensor = packed_OI.to_dense()
    return weight_OI


def packed_linear(x_TI: Tensor, packed_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x @ weight.T + bias: [T, O]."""
    num_rows = len(x_TI)
    num_missing = -num_rows % ROWS_MULTIPLE if num_rows > ROWS_MULTIPLE else 0
    if num_missing:
        x_TI = F.pad(x_TI, (0, 0, 0, num_missing))
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, packed_OI, bias_O, "none", [], "")
    return y_TO[:num_rows]


def packed_linear_reference(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The same product, of the weight before it was packed."""
    return F.linear(x_TI, weight_OI, bias_O)
