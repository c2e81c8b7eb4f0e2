"""Models that answer a prompt with one vector, made of its last token's output.

    body: the layers of a language model ── hidden_BD ──▶ head ──▶ vectors_BN

embedding   that output, of length 1
scores      a linear layer of it: how well each label fits, not normalised
reward      two linear layers of it

Axes: B prompts    D hidden    N numbers of a vector
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl.models.batch import AttentionSpec, Batch, CausalLM
from sgl.models.config import ModelConfig
from sgl.models.layers.linear import Linear
from sgl.models.layers.weight_format import plain_format
from sgl.models.layers.weights import Placement, whole


class PooledModel:
    """A language model's layers, made without its LM head, and a head of our own.

    Every rank of a tensor-parallel group has the whole outputs, and so the whole head.
    """

    def __init__(self, body: CausalLM, head: nn.Module, vector_size: int) -> None:
        self.body = body
        self.head = head
        self.vector_size = vector_size

    @property
    def fused_weights(self) -> Mapping[str, tuple[str, str]]:
        return self.body.fused_weights

    @property
    def attention_layers(self) -> list[AttentionSpec]:
        return self.body.attention_layers

    def hidden(self, batch: Batch) -> Tensor:
        """The last layer's normed output for the tokens whose output is wanted: [T, D]."""
        return self.body.hidden(batch)

    def vectors(self, hidden_BD: Tensor) -> Tensor:
        """The vectors of prompts whose last tokens have these outputs: float32 [B, N]."""
        vectors_BN: Tensor = self.head(hidden_BD)
        return vectors_BN

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.body.named_parameters()
        yield from self.head.named_parameters()

    def modules(self) -> Iterator[nn.Module]:
        yield from self.body.modules()
        yield from self.head.modules()


Model: TypeAlias = CausalLM | PooledModel


class WholeLinear(Linear):
    """A linear layer that every rank holds whole, in float32: in 16 bits two scores that differ in
    their third digit may be one."""

    def __init__(self, num_in: int, num_out: int, placement: Placement, has_bias: bool) -> None:
        wide = replace(
            placement,
            dtype=torch.float32,
            weight_format=plain_format(placement.device, torch.float32),
        )
        pieces = whole(num_out)
        super().__init__((num_out, num_in), 0, pieces, wide, pieces if has_bias else None)

    def forward(self, x_BI: Tensor) -> Tensor:
        return super().forward(x_BI.float())


class UnitLength(nn.Module):
    def forward(self, hidden_BD: Tensor) -> Tensor:
        return F.normalize(hidden_BD.float(), dim=-1)


class Scores(nn.Module):
    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        self.score = WholeLinear(config.hidden_size, config.vector_size, placement, has_bias=False)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        scores_BN: Tensor = self.score(hidden_BD)
        return scores_BN


class Reward(nn.Module):
    """The two layers have the numbers that a ReLU between them leaves them in a checkpoint."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        size = config.hidden_size
        self.score = nn.ModuleDict(
            {
                "0": WholeLinear(size, size, placement, has_bias=True),
                "2": WholeLinear(size, config.vector_size, placement, has_bias=True),
            }
        )

    def forward(self, hidden_BD: Tensor) -> Tensor:
        scores_BN: Tensor = self.score["2"](F.relu(self.score["0"](hidden_BD)))
        return scores_BN


def pooled(body: CausalLM, config: ModelConfig, placement: Placement) -> PooledModel:
    """The body with the head that the config asks for."""
    return PooledModel(body, _make_head(config, placement), config.vector_size)


def _make_head(config: ModelConfig, placement: Placement) -> nn.Module:
    match config.head:
        case "embedding":
            return UnitLength()
        case "scores":
            return Scores(config, placement)
        case "reward":
            return Reward(config, placement)
        case "tokens":
            raise AssertionError("a model that gives tokens has an LM head")
