"""Models for speed measurements: true shapes, no weights (`--load-format dummy`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "llama1b": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": _LLAMA_3
    | {
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 2000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def write_model(name: str, folder: Path) -> Path:
    """A folder with the shape's config.json."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
    return path


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer beside config.json: a word for every id, so that servers have text to send."""
    words = {f"w{number}": number for number in range(vocab_size)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def weight_bytes(name: str) -> int:
    """Bytes of bfloat16 weights that a decode step reads: layers, last norm, LM head."""
    c = SHAPES[name]
    hidden, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    attention = hidden * c["head_dim"] * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * c["intermediate_size"] + 2 * hidden
    return 2 * (c["num_hidden_layers"] * layer + hidden + c["vocab_size"] * hidden)
