"""A GGUF file of the Llama family told in the words of a Hugging Face checkpoint."""

from __future__ import annotations

import re

from sgl.errors import ConfigError
from sgl.gguf_metadata import end_ids
from sgl.models.gguf_file import GgufFile

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# config.json's name -> the metadata's, without the architecture in front
_ENTRIES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "is_causal": "attention.causal",
    "gguf_pooling_type": "pooling_type",
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<noun>\w+)\.(?P<kind>weight|bias)")
_ROPE_DIVISORS = "rope_freqs.weight"


def config_fields(file: GgufFile) -> dict[str, object]:
    """What the file's metadata and tensors say, as the entries of a config.json."""
    name = architecture(file)
    metadata = file.metadata
    found = {ours: metadata.get(f"{name}.{theirs}") for ours, theirs in _ENTRIES.items()}
    embedding = file.tensors.get("token_embd.weight")
    return {
        "architectures": [ARCHITECTURES[name]],
        **{ours: value for ours, value in found.items() if value is not None},
        "vocab_size": embedding.shape[0] if embedding else None,
        "rope_parameters": _rope_parameters(file, name),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "o_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "dtype": "bfloat16",
        "eos_token_id": end_ids(metadata),
    }


def architecture(file: GgufFile) -> str:
    """The file's own name for its network; a ConfigError where we have none for it."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path} holds a {name!r} model; GGUF files can be {', '.join(ARCHITECTURES)}"
        )
    return name


def checkpoint_name(gguf_name: str) -> str | None:
    """What a Hugging Face checkpoint calls the tensor; None for one that has no name there."""
    found = _TENSOR.fullmatch(gguf_name)
    if found is None or found["noun"] not in _NAMES:
        return None
    layer = f"model.layers.{found['layer']}." if found["layer"] else ""
    return f"{layer}{_NAMES[found['noun']]}.{found['kind']}"


def is_skipped(gguf_name: str) -> bool:
    """Whether the tensor is no weight: the divisors of the rotary angles are in the config."""
    return gguf_name == _ROPE_DIVISORS


def has_paired_rows(file: GgufFile, gguf_name: str) -> bool:
    """Whether the tensor's rows are ordered so that rotary turns neighbours, not halves."""
    return architecture(file) == "llama" and re.search(r"\.attn_[qk]\.", gguf_name) is not None


def _rope_parameters(file: GgufFile, name: str) -> dict[str, object]:
    metadata = file.metadata
    theta = metadata.get(f"{name}.rope.freq_base", 10000.0)
    rope: dict[str, object] = {"rope_theta": theta}
    if _ROPE_DIVISORS in file.tensors:
        return {**rope, "rope_type": "divided", "divisors": file.floats(_ROPE_DIVISORS)}
    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling == "none":
        return rope
    return {**rope, "rope_type": scaling, "factor": metadata.get(f"{name}.rope.scaling.factor")}
