"""Parameters that know which part of a checkpoint's tensors they hold, and where they live.

checkpoint          k_proj [total]        ···········│ first … first + num │·······
                                                          │ load("k", tensor)
this rank's weight  qkv_proj      │ q ······· │ at … at + num │ v ······· │
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sgl.kernels.collectives import TensorParallel

if TYPE_CHECKING:
    from sgl.models.layers.weight_format import WeightFormat


@dataclass(frozen=True)
class Placement:
    """Where a model's weights live: on which rank and device, in which type and format."""

    tp: TensorParallel
    device: torch.device
    dtype: torch.dtype
    weight_format: WeightFormat

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Piece(NamedTuple):
    """Entries [first, first + num) of a tensor with `total` go to [at, at + num) of ours."""

    total: int
    first: int
    num: int
    at: int = 0


class Weight(nn.Parameter):
    """A parameter cut along one axis; `pieces` are its parts, under None where it has only one."""

    axis: int
    pieces: Mapping[str | None, Piece]
    missing: set[str | None]  # parts that are not loaded yet

    def __new__(cls, data: Tensor, axis: int, pieces: Mapping[str | None, Piece]) -> Weight:
        weight = super().__new__(cls, data, requires_grad=False)
        weight.axis = axis
        weight.pieces = pieces
        weight.missing = set(pieces)
        return weight

    def full_shape(self, part: str | None) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor for `part`."""
        shape = list(self.shape)
        shape[self.axis] = self.pieces[part].total
        return tuple(shape)

    def load(self, part: str | None, tensor: Tensor) -> None:
        """Take this rank's entries of the checkpoint's tensor, converted to our type."""
        assert self.has_memory, "the weight was set aside and not reopened"
        piece = self.pieces[part]
        ours = self.data.narrow(self.axis, piece.at, piece.num)
        ours.copy_(tensor.narrow(self.axis, piece.first, piece.num))
        self.missing.discard(part)

    @property
    def has_memory(self) -> bool:
        """False once it was set aside: it has a shape and a type then, and no values."""
        return self.untyped_storage().nbytes() > 0 or self.numel() == 0

    def set_aside(self) -> None:
        """Give its memory back: what runs was made of it and does not need it."""
        self.untyped_storage().resize_(0)

    def reopen(self) -> None:
        """Expect all parts once more. One that was not set aside keeps its place in memory."""
        if not self.has_memory:
            self.untyped_storage().resize_(self.numel() * self.element_size())
        self.missing = set(self.pieces)


def whole(length: int) -> dict[str | None, Piece]:
    """Every rank holds everything."""
    return {None: Piece(length, 0, length)}


def even_pieces(lengths: Mapping[str | None, int], tp: TensorParallel) -> dict[str | None, Piece]:
    """Every rank holds an equal share of each part, the parts one after the other."""
    pieces: dict[str | None, Piece] = {}
    at = 0
    for part, total in lengths.items():
        assert total % tp.size == 0, f"{total} cannot be split over {tp.size} ranks"
        num = total // tp.size
        pieces[part] = Piece(total, tp.rank * num, num, at)
        at += num
    return pieces


def total_len(pieces: Mapping[str | None, Piece]) -> int:
    """How long the parts are together, on this rank."""
    return sum(piece.num for piece in pieces.values())
