"""A model so small that a server with it is ready in seconds and makes a step in milliseconds.

Its weights are random, its tokenizer is that of the demo model.
"""

from __future__ import annotations

import json
from pathlib import Path

from sgl.model_files import demo_model_path

VOCAB_SIZE = 49152  # the tokenizer's
CONTEXT_LEN = 2048
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT_LEN,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def write_toy(folder: Path) -> Path:
    """A checkpoint without weights: for `--load-format dummy`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def toy_settings(folder: Path) -> dict[str, str]:
    """Names and values of the flags that serve the toy, which is written into `folder`."""
    return {
        "model_path": str(write_toy(folder)),
        "tokenizer_path": demo_model_path(),
        "load_format": "dummy",
        "num_cpu_threads": "1",  # two would wait for each other on a machine with other work
        "dtype": "float32",  # as on paper: equal prompts have equal answers whatever runs beside
    }


def toy_flags(folder: Path) -> list[str]:
    """`toy_settings` as a command line."""
    settings = toy_settings(folder).items()
    return [word for key, value in settings for word in (f"--{key.replace('_', '-')}", value)]
