"""Llama 2 and 3, SmolLM, Mistral, Qwen 2: pre-norm, grouped-query attention, rotary, SwiGLU.

Axes: T tokens of the batch, laid end to end    D hidden    F feed-forward    V vocabulary
      H query heads    K key/value heads    N = H + 2K    E head size    B rows with logits

The residual stream is one buffer. A block adds to it where its last product can do that itself;
else it returns what is to be added, each rank its part, and the next norm adds the sum of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from sgl.kernels.collectives import TensorParallel
from sgl.kernels.silu_and_mul import silu_and_mul
from sgl.models.batch import Angles, AttentionSpec, Batch
from sgl.models.config import ModelConfig
from sgl.models.layers.embedding import LMHead, VocabParallelEmbedding
from sgl.models.layers.linear import (
    MergedColumnLinear,
    QKVLinear,
    RowParallelLinear,
    num_local_kv_heads,
)
from sgl.models.layers.norm import RMSNorm
from sgl.models.layers.rotary import Rotary
from sgl.models.layers.weights import Placement


def attention_spec(config: ModelConfig, layer_id: int, tp: TensorParallel) -> AttentionSpec:
    return AttentionSpec(
        num_heads=config.num_heads // tp.size,
        num_kv_heads=num_local_kv_heads(config, tp),
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        window=config.layer_windows[layer_id],
    )


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer_id: int, placement: Placement) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.spec = attention_spec(config, layer_id, placement.tp)
        num_in = config.num_heads * config.head_dim
        self.qkv_proj = QKVLinear(config, placement)
        self.o_proj = RowParallelLinear(num_in, config.hidden_size, placement, config.o_bias)

    def forward(
        self, x_TD: Tensor, stream_TD: Tensor, angles: Angles, batch: Batch
    ) -> Tensor | None:
        """What is to be added to the residual stream still."""
        H, K, E = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        qkv_TNE = self.qkv_proj(x_TD).view(-1, H + 2 * K, E)
        o_THE = batch.attend(self.layer_id, qkv_TNE, angles)
        return self.o_proj.add_to(stream_TD, o_THE.flatten(start_dim=1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = MergedColumnLinear(
            config.hidden_size, {"gate": size, "up": size}, placement, config.mlp_bias
        )
        self.down_proj = RowParallelLinear(size, config.hidden_size, placement, config.mlp_bias)

    def forward(self, x_TD: Tensor, stream_TD: Tensor) -> Tensor | None:
        """What is to be added to the residual stream still."""
        return self.down_proj.add_to(stream_TD, silu_and_mul(self.gate_up_proj(x_TD)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer_id: int, placement: Placement) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_eps, placement)
        self.self_attn = Attention(config, layer_id, placement)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_eps, placement)
        self.mlp = MLP(config, placement)

    def forward(
        self, stream_TD: Tensor, delta_TD: Tensor | None, angles: Angles, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream, and what is to be added to it still."""
        x_TD = self.input_layernorm.add(stream_TD, delta_TD)
        stream_TD = batch.kept(self.self_attn.layer_id, stream_TD)
        delta_TD = self.self_attn(x_TD, stream_TD, angles, batch)
        x_TD = self.post_attention_layernorm.add(stream_TD, delta_TD)
        return stream_TD, self.mlp(x_TD, stream_TD)


class Llama(nn.Module):
    fused_weights: ClassVar[Mapping[str, tuple[str, str]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embed_tokens = VocabParallelEmbedding(*vocabulary, placement)
        self.rotary = Rotary(config.head_dim, config.rope, placement.device)
        self.layers = nn.ModuleList(
            Layer(config, layer_id, placement) for layer_id in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_eps, placement)
        if not config.is_pooled:
            self.lm_head = LMHead(*vocabulary, placement)
            if config.tie_word_embeddings:
                self.lm_head.tie(self.embed_tokens)
        self.attention_layers = [
            attention_spec(config, layer_id, placement.tp) for layer_id in range(config.num_layers)
        ]

    def hidden(self, batch: Batch) -> Tensor:
        embedded_TD = self.embed_tokens(batch.token_ids_T)
        stream_TD, delta_TD = torch.zeros_like(embedded_TD), embedded_TD
        angles = self.rotary(batch.positions_T)
        for layer in self.layers:
            stream_TD, delta_TD = layer(stream_TD, delta_TD, angles, batch)
        return self.norm.add(stream_TD, delta_TD)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        return self.lm_head(hidden_BD)
