"""What a model is: its sizes, read once from config.json or from the metadata of a GGUF file.

Loads without torch, for the processes that need only the context length or the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from sgl.errors import ConfigError
from sgl.models.config_fields import Fields
from sgl.models.gguf_checkpoint import config_fields as gguf_config_fields
from sgl.models.gguf_file import GgufFile, find_gguf
from sgl.models.pooling_config import check_pooling, vector_sizes
from sgl.models.registry import Head, layers_and_head

RopeScaling: TypeAlias = Literal["none", "linear", "llama3", "divided"]

# What an architecture says without its config.json saying so
IMPLIED: Mapping[str, Mapping[str, object]] = {
    "Qwen2ForCausalLM": {"qkv_bias": True, "use_sliding_window": False},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """The angles of rotary positions: position / theta^(2i / head size), then scaled.

    linear    all divided by `factor`
    llama3    slow ones divided by `factor`, fast ones kept, a smooth passage between them
    divided   the i-th divided by `divisors[i]`
    """

    theta: float
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_len: int = 8192
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The numbers that make a network out of an architecture.

    architecture    of the layers, as `registry.MODELS` names it
    head            what is at their end: tokens are sampled from it, else it gives one vector for
                    a prompt
    vector_sizes    lengths that such a vector can be given, its own last; none for tokens
    layer_windows   per layer, how many tokens one token sees, itself included; None: all
    dtype           of the checkpoint: "float32", "float16" or "bfloat16"
    quantization    name of the checkpoint's quantisation method; None: its weights are plain
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_len: int
    rms_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    layer_windows: tuple[int | None, ...]
    dtype: str
    eos_ids: tuple[int, ...]
    quantization: str | None
    head: Head = "tokens"
    vector_sizes: Sequence[int] = ()

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Mapping[str, object] | None = None,
        *,
        is_embedding: bool = False,
    ) -> ModelConfig:
        """The config of a checkpoint folder or a .gguf file; `overrides` win over what it says.

        is_embedding  the last layer's output is wanted, whatever the model was made for
        """
        fields = read_fields(Path(path)).overridden_by(overrides or {})
        config = cls.from_fields(fields)
        if is_embedding and config.head == "tokens":
            config = replace(config, head="embedding")
        if config.head == "tokens":
            return config
        check_pooling(Path(path), fields, config.head)
        return replace(config, vector_sizes=vector_sizes(fields, config.head))

    @classmethod
    def from_fields(cls, fields: Fields) -> ModelConfig:
        architecture, head = layers_and_head(_architecture(fields))
        fields = fields.over(IMPLIED.get(architecture, {}))
        has_attention_bias = fields.flag("attention_bias", False)
        num_heads = fields.count("num_attention_heads")
        num_layers = fields.count("num_hidden_layers")
        hidden_size = fields.count("hidden_size")
        config = cls(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.count("num_key_value_heads", num_heads),
            head_dim=fields.count("head_dim", hidden_size // num_heads),
            intermediate_size=fields.count("intermediate_size"),
            vocab_size=fields.count("vocab_size"),
            context_len=_context_len(fields),
            rms_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(fields.table("rope_parameters")),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            qkv_bias=fields.flag("qkv_bias", has_attention_bias),
            o_bias=fields.flag("o_bias", has_attention_bias),
            mlp_bias=fields.flag("mlp_bias", False),
            layer_windows=_layer_windows(fields, num_layers),
            dtype=fields.text("dtype", "float32"),
            eos_ids=fields.integers("eos_token_id"),
            quantization=fields.table("quantization_config").optional_text("quant_method"),
            head=head,
        )
        config._check(fields.source)
        return config

    @property
    def is_pooled(self) -> bool:
        """It gives one vector for a prompt, and no tokens."""
        return self.head != "tokens"

    @property
    def vector_size(self) -> int:
        return self.vector_sizes[-1]

    def check_tp_size(self, size: int) -> None:
        """Raises ConfigError, naming the sizes that work, where `size` ranks cannot share it."""
        if self._splits_over(size):
            return
        sizes = [n for n in range(1, self.num_heads + 1) if self._splits_over(n)]
        raise ConfigError(
            f"{self.num_heads} attention heads, {self.num_kv_heads} key/value heads and "
            f"{self.intermediate_size} feed-forward channels cannot be split over {size} ranks: "
            f"--tp-size may be {', '.join(map(str, sizes))}"
        )

    def _splits_over(self, size: int) -> bool:
        kv_heads_split = self.num_kv_heads % size == 0 or size % self.num_kv_heads == 0
        even = self.num_heads % size == 0 and self.intermediate_size % size == 0
        return even and kv_heads_split

    def _check(self, source: str) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{source}: {self.num_heads} attention heads cannot share {self.num_kv_heads} "
                "key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{source}: head_dim is {self.head_dim}; rotary needs an even one")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ConfigError(
                f"{source}: dtype is {self.dtype!r}; it can be float32, float16 or bfloat16"
            )


def read_fields(path: Path) -> Fields:
    """The config of a checkpoint in the names config.json uses, wherever it is kept."""
    if path.is_dir() and (path / "config.json").is_file():
        fields = Fields.from_json(path / "config.json")
        generation = path / "generation_config.json"
        if not generation.is_file():
            return fields
        more = Fields.from_json(generation).integers("eos_token_id")
        eos_ids = dict.fromkeys((*fields.integers("eos_token_id"), *more))
        return fields.overridden_by({"eos_token_id": list(eos_ids)})
    gguf_path = find_gguf(path)
    if gguf_path is None:
        raise ConfigError(
            f"{path} has no config.json and is no .gguf file: give the folder of a Hugging Face "
            "checkpoint or a .gguf file as --model-path"
        )
    return Fields(gguf_config_fields(GgufFile(gguf_path)), source=str(gguf_path))


def _architecture(fields: Fields) -> str:
    names = fields.texts("architectures")
    if not names:
        raise ConfigError(f"{fields.source}: architectures is empty; it should name the model")
    return names[0]


def _context_len(fields: Fields) -> int:
    trained_len = fields.count("max_position_embeddings")
    rope = fields.table("rope_parameters")
    if rope.text("rope_type", "default") != "linear":
        return trained_len  # llama3 names the length after scaling
    return int(trained_len * rope.number("factor"))


def _rope(fields: Fields) -> RopeConfig:
    theta = fields.number("rope_theta", 10000.0)
    match fields.text("rope_type", "default"):
        case "default":
            return RopeConfig(theta=theta)
        case "linear":
            return RopeConfig(theta=theta, scaling="linear", factor=fields.number("factor"))
        case "llama3":
            return RopeConfig(
                theta=theta,
                scaling="llama3",
                factor=fields.number("factor"),
                low_freq_factor=fields.number("low_freq_factor"),
                high_freq_factor=fields.number("high_freq_factor"),
                original_context_len=fields.count("original_max_position_embeddings"),
            )
        case "divided":
            return RopeConfig(theta=theta, scaling="divided", divisors=fields.numbers("divisors"))
        case unknown:
            known = ", ".join(name for name in get_args(RopeScaling) if name != "divided")
            raise ConfigError(
                f"{fields.source}: rope scaling {unknown!r} is not supported, only {known}; to "
                "run the model within its original context, pass --json-model-override-args "
                """'{"rope_scaling": null}'"""
            )


def _layer_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    window = fields.optional_count("sliding_window")
    has_window = window is not None and window < fields.count("max_position_embeddings")
    if not has_window or not fields.flag("use_sliding_window", True):
        return (None,) * num_layers
    kinds = fields.texts("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds[:num_layers])
    num_full = min(fields.optional_count("max_window_layers") or 0, num_layers)
    return (None,) * num_full + (window,) * (num_layers - num_full)
