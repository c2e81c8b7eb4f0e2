"""What passes between a model and whoever runs it: a batch in, logits out.

    runner ── Batch: ids, positions ──▶ model.hidden ──▶ rows ──▶ model.logits ──▶ runner
       ▲                                     │
       └── batch.attend(layer, qkv, angles) ◀┘   the runner owns the KV cache; the model does not

Axes: T tokens of the batch, laid end to end    D hidden    V vocabulary    B rows with logits
      H query heads    K key/value heads    N = H + 2K    E head size    (H and K: of this rank)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn


class AttentionSpec(NamedTuple):
    """One attention layer as this rank holds it; what a KV cache and its kernels must know.

    scale      factor of q @ k before the softmax
    window     a token sees itself and the `window - 1` tokens before it; None: all before it
    soft_cap   scores become soft_cap * tanh(score / soft_cap); None: left as they are
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None


class Angles(NamedTuple):
    """Cosine and sine of every token's rotary position, float32; half of the sines negated."""

    cos_T1E: Tensor
    sin_T1E: Tensor


class Batch(Protocol):
    """The tokens of one forward pass, and the way to their KV."""

    token_ids_T: Tensor
    positions_T: Tensor

    def attend(self, layer_id: int, qkv_TNE: Tensor, angles: Angles) -> Tensor:
        """Turn queries and keys by their positions, store keys and values, attend: [T, H, E].

        `qkv_TNE` holds the heads of queries, keys and values side by side, and is used up. After
        the last layer's attention only those of the T tokens are left whose output is wanted.
        """
        ...

    def kept(self, layer_id: int, x_TD: Tensor) -> Tensor:
        """The rows of `x_TD` that are left after the attention of this layer."""
        ...


class CausalLM(Protocol):
    """A language model. Every rank of a tensor-parallel group makes the same calls.

    fused_weights   checkpoint name -> (name of ours, which part of it); others are ours as they are
    """

    fused_weights: ClassVar[Mapping[str, tuple[str, str]]]
    attention_layers: list[AttentionSpec]

    def hidden(self, batch: Batch) -> Tensor:
        """The last layer's normed output for the tokens whose output is wanted: [T, D]."""
        ...

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Logits of rows of `hidden`, float32: of this rank's part of the vocabulary, all parts
        equally long, -inf beyond its end."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...
