"""Models small enough to make in a test, and a batch that attends to itself without a cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sgl.kernels.collectives import TensorParallel
from sgl.kernels.rotary import rotate
from sgl.models.batch import Angles, AttentionSpec, CausalLM
from sgl.models.config import ModelConfig
from sgl.models.loader import load_model

CPU = torch.device("cpu")

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_config(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA | changes))
    return folder


def checkpoint_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a Llama, under the names of its checkpoints."""
    shapes = _layer_shapes(config)
    hidden = config.hidden_size
    shapes["model.embed_tokens.weight"] = (config.vocab_size, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if "norm" in name else 0.0)
        for name, shape in shapes.items()
    }


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    num_q, num_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (num_q, hidden, config.qkv_bias),
        "self_attn.k_proj": (num_kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (num_kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, num_q, config.o_bias),
        "mlp.gate_proj": (ffn, hidden, config.mlp_bias),
        "mlp.up_proj": (ffn, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, ffn, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (f"model.layers.{layer_id}" for layer_id in range(config.num_layers)):
        for name, (num_out, num_in, has_bias) in linears.items():
            shapes[f"{layer}.{name}.weight"] = (num_out, num_in)
            if has_bias:
                shapes[f"{layer}.{name}.bias"] = (num_out,)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def write_checkpoint(folder: Path, **changes: object) -> dict[str, Tensor]:
    """A folder with config.json and model.safetensors; returns the weights."""
    config = ModelConfig.load(write_config(folder, **changes))
    tensors = checkpoint_tensors(config)
    save_file(tensors, folder / "model.safetensors")
    return tensors


@dataclass
class DenseBatch:
    """One sequence from its start."""

    token_ids_T: Tensor
    positions_T: Tensor
    layers: Sequence[AttentionSpec]

    @classmethod
    def of(cls, model: CausalLM, token_ids: Sequence[int]) -> DenseBatch:
        positions_T = torch.arange(len(token_ids))
        return cls(torch.tensor(token_ids), positions_T, model.attention_layers)

    def kept(self, layer_id: int, x_TD: Tensor) -> Tensor:
        return x_TD

    def attend(self, layer_id: int, qkv_TNE: Tensor, angles: Angles) -> Tensor:
        spec = self.layers[layer_id]
        counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        assert qkv_TNE.shape[1:] == (sum(counts), spec.head_dim)
        rotate(qkv_TNE[:, : sum(counts[:2])], *angles)
        q_THE, k_TKE, v_TKE = qkv_TNE.split(counts, dim=1)
        group_len = spec.num_heads // spec.num_kv_heads
        k_THE, v_THE = (x.repeat_interleave(group_len, dim=1) for x in (k_TKE, v_TKE))
        scores_HTS = torch.einsum("the,she->hts", q_THE, k_THE) * spec.scale
        distance_TS = self.positions_T[:, None] - self.positions_T
        is_hidden_TS = distance_TS < 0
        if spec.window is not None:
            is_hidden_TS |= distance_TS >= spec.window
        weights_HTS = scores_HTS.masked_fill(is_hidden_TS, -torch.inf).softmax(dim=-1)
        return torch.einsum("hts,she->the", weights_HTS, v_THE)


def loaded(path: Path, tp: TensorParallel | None = None, **options: object) -> CausalLM:
    options = {"dtype": "float32", "device": CPU, **options}
    model, _ = load_model(path, tp=tp or TensorParallel(), **options)
    return model


@torch.inference_mode()
def sequence_logits(
    model: CausalLM, token_ids: Sequence[int], tp: TensorParallel | None = None
) -> Tensor:
    """Logits at every position of one sequence."""
    logits_TV = model.logits(model.hidden(DenseBatch.of(model, token_ids)))
    whole_TV = (tp or TensorParallel()).all_gather_last(logits_TV)
    return whole_TV[:, : model.embed_tokens.piece.total].contiguous()
