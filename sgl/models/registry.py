"""Which class is which architecture. A class is imported when a model of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from sgl.errors import ConfigError

if TYPE_CHECKING:
    from sgl.models.batch import CausalLM
    from sgl.models.config import ModelConfig
    from sgl.models.layers.weights import Placement

Head: TypeAlias = Literal["tokens", "embedding", "scores", "reward"]

MODELS = {
    "LlamaForCausalLM": "sgl.models.llama:Llama",
    "MistralForCausalLM": "sgl.models.llama:Llama",  # with a window in the older ones
    "Qwen2ForCausalLM": "sgl.models.llama:Llama",  # with a bias on q, k and v
}


class PooledArchitecture(NamedTuple):
    """An architecture that gives one vector for a prompt: whose layers it has, and its head."""

    layers_of: str
    head: Head


POOLED: Mapping[str, PooledArchitecture] = {
    "LlamaModel": PooledArchitecture("LlamaForCausalLM", "embedding"),
    "LlamaEmbeddingModel": PooledArchitecture("LlamaForCausalLM", "embedding"),
    "LlamaForSequenceClassification": PooledArchitecture("LlamaForCausalLM", "scores"),
    "MistralModel": PooledArchitecture("MistralForCausalLM", "embedding"),
    "MistralForSequenceClassification": PooledArchitecture("MistralForCausalLM", "scores"),
    "Qwen2Model": PooledArchitecture("Qwen2ForCausalLM", "embedding"),
    "Qwen2ForSequenceClassification": PooledArchitecture("Qwen2ForCausalLM", "scores"),
    "Qwen2ForRewardModel": PooledArchitecture("Qwen2ForCausalLM", "reward"),
}


class ModelClass(Protocol):
    """Makes a model whose weights are not loaded yet."""

    def __call__(self, config: ModelConfig, placement: Placement) -> CausalLM: ...


def layers_and_head(architecture: str) -> tuple[str, Head]:
    """The name in `MODELS` of its layers, and what is at their end; raises ConfigError."""
    if architecture in MODELS:
        return architecture, "tokens"
    if architecture in POOLED:
        return POOLED[architecture]
    known = ", ".join([*sorted(MODELS), *sorted(POOLED)])
    raise ConfigError(f"no model for {architecture!r}; there is {known}")


def model_class(architecture: str) -> ModelClass:
    module_name, class_name = MODELS[architecture].split(":")
    found: ModelClass = getattr(import_module(module_name), class_name)
    return found
