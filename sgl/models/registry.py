"""Which class is which architecture. A class is imported when a model of it is loaded."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from sgl.errors import ConfigError

if TYPE_CHECKING:
    from sgl.models.batch import CausalLM
    from sgl.models.config import ModelConfig
    from sgl.models.layers.weights import Placement

MODELS = {
    "LlamaForCausalLM": "sgl.models.llama:Llama",
    "MistralForCausalLM": "sgl.models.llama:Llama",  # with a window in the older ones
    "Qwen2ForCausalLM": "sgl.models.llama:Llama",  # with a bias on q, k and v
}


class ModelClass(Protocol):
    """Makes a model whose weights are not loaded yet."""

    def __call__(self, config: ModelConfig, placement: Placement) -> CausalLM: ...


def check_architecture(architecture: str) -> None:
    """Raises ConfigError where there is no class for it."""
    if architecture not in MODELS:
        raise ConfigError(f"no model for {architecture!r}; there is {', '.join(sorted(MODELS))}")


def model_class(architecture: str) -> ModelClass:
    check_architecture(architecture)
    module_name, class_name = MODELS[architecture].split(":")
    found: ModelClass = getattr(import_module(module_name), class_name)
    return found
