"""How linear layers keep their weights. A quantisation method is one more `WeightFormat`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from sgl.kernels.linear import add_linear, can_add_linear, linear
from sgl.kernels.packed_linear import can_pack, pack, packed_linear, unpack
from sgl.models.layers.weights import Piece, Placement, Weight


class WeightFormat(Protocol):
    """What a checkpoint holds for a linear layer, what runs, and the product with it."""

    def create(
        self,
        shape_OI: tuple[int, int],
        axis: int,
        pieces: Mapping[str | None, Piece],
        placement: Placement,
    ) -> dict[str, Weight]:
        """The parameters to be loaded, under the checkpoint's names for them."""
        ...

    def finish(self, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that run, made out of those that were loaded."""
        ...

    def original(self, finished: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What was loaded, out of what runs: the opposite of `finish`."""
        ...

    def multiply(
        self,
        weights: Mapping[str, Tensor],
        x_TI: Tensor,
        bias_O: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x @ weight.T + bias: [T, O], with what `finish` gave; in `dtype`, or that of `x_TI`."""
        ...

    def add_product(self, weights: Mapping[str, Tensor], x_TI: Tensor, stream_TO: Tensor) -> bool:
        """Add x @ weight.T to the stream in one kernel; False, and nothing, if that is slower."""
        ...


class PlainFormat:
    """One matrix, as it is in the checkpoint."""

    def create(
        self,
        shape_OI: tuple[int, int],
        axis: int,
        pieces: Mapping[str | None, Piece],
        placement: Placement,
    ) -> dict[str, Weight]:
        return {"weight": Weight(placement.empty(*shape_OI), axis, pieces)}

    def finish(self, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(loaded)

    def original(self, finished: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return finished

    def multiply(
        self,
        weights: Mapping[str, Tensor],
        x_TI: Tensor,
        bias_O: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        return linear(x_TI, weights["weight"], bias_O, dtype)

    def add_product(self, weights: Mapping[str, Tensor], x_TI: Tensor, stream_TO: Tensor) -> bool:
        if not can_add_linear(x_TI):
            return False
        add_linear(stream_TO, x_TI, weights["weight"])
        return True


class PackedFormat(PlainFormat):
    """One matrix, rearranged after loading for the CPU's matrix kernels."""

    def finish(self, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"packed": pack(loaded["weight"])}

    def original(self, finished: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"weight": unpack(finished["packed"])}

    def multiply(
        self,
        weights: Mapping[str, Tensor],
        x_TI: Tensor,
        bias_O: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        return packed_linear(x_TI, weights["packed"], bias_O).to(dtype or x_TI.dtype)

    def add_product(self, weights: Mapping[str, Tensor], x_TI: Tensor, stream_TO: Tensor) -> bool:
        return False


def plain_format(device: torch.device, dtype: torch.dtype) -> WeightFormat:
    """The fastest format for weights that are not quantised."""
    return PackedFormat() if can_pack(device, dtype) else PlainFormat()
