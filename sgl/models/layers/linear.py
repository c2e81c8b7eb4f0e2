"""Linear layers, each holding one rank's part of its weight.

column parallel   rows of the weight are split: a rank computes some of the outputs
row parallel      columns are split: a rank sees some of the inputs, the outputs are to be summed
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sgl.kernels.collectives import TensorParallel
from sgl.models.config import ModelConfig
from sgl.models.layers.weights import Piece, Placement, Weight, even_pieces, total_len, whole


class Linear(nn.Module):
    """A product with a weight in the placement's format, and a bias if it has one.

    loaded    what a checkpoint is loaded into; without memory where `weights` do not need it
    weights   what runs; until `finish_loading` the same
    """

    bias: Weight | None

    def __init__(
        self,
        shape_OI: tuple[int, int],
        axis: int,
        pieces: Mapping[str | None, Piece],
        placement: Placement,
        bias_pieces: Mapping[str | None, Piece] | None = None,
    ) -> None:
        super().__init__()
        self.format = placement.weight_format
        created = self.format.create(shape_OI, axis, pieces, placement)
        for name, weight in created.items():
            self.register_parameter(name, weight)
        self.loaded: dict[str, Weight] = dict(created)
        self.weights: dict[str, Tensor] = dict(created)
        self.is_finished = False
        bias = Weight(placement.empty(shape_OI[0]), 0, bias_pieces) if bias_pieces else None
        self.register_parameter("bias", bias)

    @property
    def is_loaded(self) -> bool:
        """Whether all of it has come."""
        bias = [] if self.bias is None else [self.bias]
        return not any(weight.missing for weight in (*self.loaded.values(), *bias))

    def finish_loading(self) -> None:
        """Must be called when all weights are loaded, for the first time or once more.

        What runs already keeps its place in memory, where recorded graphs read it.
        """
        before = self.weights if self.is_finished else {}
        finished = self.format.finish(self.loaded)
        self.weights = {name: _renewed(before.get(name), new) for name, new in finished.items()}
        self.is_finished = True
        for name in self.loaded.keys() - self.weights.keys():
            self.set_aside(name)

    def set_aside(self, name: str) -> None:
        """A weight is needed no more once what runs is made of it."""
        self.loaded[name].set_aside()

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.format.multiply(self.weights, x_TI, self.bias)


class MergedColumnLinear(Linear):
    """Several column-parallel layers of the same input, their outputs side by side."""

    def __init__(
        self,
        num_in: int,
        num_out: Mapping[str | None, int],
        placement: Placement,
        has_bias: bool = False,
    ) -> None:
        pieces = even_pieces(num_out, placement.tp)
        shape_OI = (total_len(pieces), num_in)
        super().__init__(shape_OI, 0, pieces, placement, pieces if has_bias else None)


class ColumnParallelLinear(MergedColumnLinear):
    """A single column-parallel layer."""

    def __init__(
        self, num_in: int, num_out: int, placement: Placement, has_bias: bool = False
    ) -> None:
        super().__init__(num_in, {None: num_out}, placement, has_bias)


class QKVLinear(Linear):
    """Queries, keys and values of this rank's heads.

    With fewer key/value heads than ranks, neighbouring ranks hold the same one.
    """

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        pieces = qkv_pieces(config, placement.tp)
        shape_OI = (total_len(pieces), config.hidden_size)
        super().__init__(shape_OI, 0, pieces, placement, pieces if config.qkv_bias else None)


class RowParallelLinear(Linear):
    """A layer whose input is already split over the ranks.

    What it gives is this rank's part of a sum, which `RMSNorm.add` or `tp.all_reduce` takes.
    """

    def __init__(
        self, num_in: int, num_out: int, placement: Placement, has_bias: bool = False
    ) -> None:
        pieces = even_pieces({None: num_in}, placement.tp)
        bias_pieces = whole(num_out) if has_bias else None
        super().__init__((num_out, total_len(pieces)), 1, pieces, placement, bias_pieces)
        self.tp = placement.tp

    def forward(self, x_TI: Tensor) -> Tensor:
        bias_O = self.bias if self.tp.rank == 0 else None  # the sum must hold it once
        return self.format.multiply(self.weights, x_TI, bias_O)

    def add_to(self, stream_TO: Tensor, x_TI: Tensor) -> Tensor | None:
        """Add the output to the residual stream and return None, where one kernel can do both; else
        what is to be added, as `forward` gives it."""
        is_alone = self.tp.size == 1 and self.bias is None
        if is_alone and self.format.add_product(self.weights, x_TI, stream_TO):
            return None
        return self(x_TI)


def _renewed(running: Tensor | None, new: Tensor) -> Tensor:
    """`new`, in the place of what runs; a packed tensor has no place that anybody could know."""
    if running is None or running is new or running.layout != torch.strided:
        return new
    return running.copy_(new)


def num_local_kv_heads(config: ModelConfig, tp: TensorParallel) -> int:
    """Key/value heads each rank holds."""
    return max(1, config.num_kv_heads // tp.size)


def qkv_pieces(config: ModelConfig, tp: TensorParallel) -> dict[str | None, Piece]:
    """Which rows of q, k and v a rank holds."""
    size = config.head_dim
    num_heads = config.num_heads // tp.size
    num_kv_heads = num_local_kv_heads(config, tp)
    first_kv_head = tp.rank * config.num_kv_heads // tp.size
    num_q, num_kv = num_heads * size, num_kv_heads * size
    total_kv = config.num_kv_heads * size
    return {
        "q": Piece(config.num_heads * size, tp.rank * num_q, num_q),
        "k": Piece(total_kv, first_kv_head * size, num_kv, at=num_q),
        "v": Piece(total_kv, first_kv_head * size, num_kv, at=num_q + num_kv),
    }
