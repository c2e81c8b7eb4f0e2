"""The vocabulary's two ends, each rank holding an equal share of its rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgl.kernels.collectives import TensorParallel
from sgl.kernels.embedding import embed
from sgl.models.layers.linear import Linear
from sgl.models.layers.weights import Piece, Placement, Weight

VOCAB_ALIGNMENT = 64  # a share is padded to a multiple of so many rows, which suits matrix kernels


def vocab_piece(vocab_size: int, tp: TensorParallel) -> tuple[Piece, int]:
    """The ids this rank holds, and how many rows that is with the padding."""
    num_rows = -(-vocab_size // (VOCAB_ALIGNMENT * tp.size)) * VOCAB_ALIGNMENT
    first = min(tp.rank * num_rows, vocab_size)
    return Piece(vocab_size, first, min(num_rows, vocab_size - first)), num_rows


class VocabParallelEmbedding(nn.Module):
    """Token ids to hidden states, of which every rank gives a part of the sum: zeros for ids that
    others hold. An id outside the vocabulary is undefined on one rank."""

    def __init__(self, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.piece, num_rows = vocab_piece(vocab_size, placement.tp)
        data = placement.empty(num_rows, hidden_size).zero_()
        self.weight = Weight(data, 0, {None: self.piece})

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return embed(token_ids_T, self.weight, self.piece.first, self.piece.num, self.piece.total)


class LMHead(Linear):
    """Hidden states to logits in float32, every rank those of its part of the vocabulary.

    All parts are equally long; what is beyond the vocabulary is -inf.
    """

    def __init__(self, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        piece, num_rows = vocab_piece(vocab_size, placement.tp)
        super().__init__((num_rows, hidden_size), 0, {None: piece}, placement)
        self.num_ids = piece.num
        self.is_tied = False

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding's weight."""
        del self.weight
        self.loaded = {"weight": embedding.weight}
        self.weights = {"weight": embedding.weight}
        self.is_tied = True

    def set_aside(self, name: str) -> None:
        if not self.is_tied:  # else the embedding needs it
            super().set_aside(name)

    def forward(self, x_BD: Tensor) -> Tensor:
        logits_BV = self.format.multiply(self.weights, x_BD, None, torch.float32)
        if self.num_ids < logits_BV.shape[1]:
            logits_BV[:, self.num_ids :] = float("-inf")
        return logits_BV
