"""From a path to a model that is ready to run: config, network, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from sgl.errors import ConfigError
from sgl.kernels.collectives import TensorParallel
from sgl.models.checkpoint import (
    Checkpoint,
    DummyTensor,
    LoadFormat,
    dummy_checkpoint,
    open_checkpoint,
)
from sgl.models.config import ModelConfig
from sgl.models.layers.linear import Linear
from sgl.models.layers.weight_format import plain_format
from sgl.models.layers.weights import Placement, Weight
from sgl.models.pooling import Model, pooled
from sgl.models.registry import model_class

Progress: TypeAlias = Callable[[int, int], None]  # tensors loaded, tensors in all

DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}
MAX_NAMES = 6  # that one error message lists


def load_model(
    path: str | Path,
    *,
    load_format: LoadFormat = "auto",
    dtype: str = "auto",
    device: torch.device,
    tp: TensorParallel,
    overrides: Mapping[str, object] | None = None,
    is_embedding: bool = False,
    progress: Progress | None = None,
) -> tuple[Model, ModelConfig]:
    """This rank's part of a model, its weights loaded; raises ConfigError where it cannot be.

    Without `progress`, rank 0 shows a bar where stderr is a terminal.
    """
    path = Path(path)
    config = ModelConfig.load(path, overrides, is_embedding=is_embedding)
    config.check_tp_size(tp.size)
    _check_quantization(config)
    torch_dtype = resolve_dtype(dtype, config, device)
    placement = Placement(tp, device, torch_dtype, plain_format(device, torch_dtype))
    model = _create(config, placement)
    if load_format == "dummy":
        checkpoint = dummy_checkpoint(_dummy_tensors(model), device, torch_dtype)
    else:
        checkpoint = open_checkpoint(path, load_format, torch_dtype, config.head_dim)
    fill(model, config, checkpoint, progress or _terminal_bar(checkpoint, tp))
    finish_loading(model)
    return model, config


def resolve_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type a --dtype asks for; "auto" takes what is fast on the device."""
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"--dtype can be auto, {', '.join(DTYPES)}; not {name!r}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float16


def fill(model: Model, config: ModelConfig, checkpoint: Checkpoint, progress: Progress) -> None:
    """Load every weight of the model exactly once; a ConfigError names those that do not fit."""
    weights = _weights(model)
    unexpected = []
    for num_seen, (name, tensor) in enumerate(checkpoint.tensors, start=1):
        progress(num_seen, checkpoint.num_tensors)
        if _is_ignored(name, config):
            continue
        our_name, part = _our_name(name, model.fused_weights)
        weight = weights.get(our_name)
        if weight is None or part not in weight.pieces:
            unexpected.append(name)
        else:
            _load(weight, part, name, tensor, checkpoint.source)
    missing = [name for name, weight, part in _parts(model) if part in weight.missing]
    problems = _listed("it lacks", missing) + _listed("the model has no", unexpected)
    if problems:
        raise ConfigError(
            f"{checkpoint.source} does not fit {config.architecture}: {'; '.join(problems)}; "
            "check that the weights and config.json belong together"
        )


def finish_loading(model: Model) -> None:
    """Bring all linear layers into the form that runs."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.finish_loading()


def _create(config: ModelConfig, placement: Placement) -> Model:
    try:
        model = model_class(config.architecture)(config, placement)
        return pooled(model, config, placement) if config.is_pooled else model
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the weights do not fit on {placement.device}: use more GPUs (--tp-size) or a smaller "
            f"model; {str(error).partition('. ')[0]}"
        ) from None


def _check_quantization(config: ModelConfig) -> None:
    if config.quantization is not None:
        raise ConfigError(
            f"the checkpoint is quantised with {config.quantization!r}, which is not supported: "
            "use the original checkpoint or a GGUF file of it"
        )


def _load(weight: Weight, part: str | None, name: str, tensor: Tensor, source: str) -> None:
    shape = weight.full_shape(part)
    if tuple(tensor.shape) != shape:
        raise ConfigError(
            f"{source}: {name} has the shape {tuple(tensor.shape)} where the config asks for "
            f"{shape}; check that the weights and config.json belong together"
        )
    if part not in weight.missing:
        raise ConfigError(f"{source} has {name} twice: remove the file that is not part of it")
    weight.load(part, tensor)


def _weights(model: Model) -> dict[str, Weight]:
    found = {}
    for name, weight in model.named_parameters():
        assert isinstance(weight, Weight), f"{name} does not say how it is loaded"
        found[name] = weight
    return found


def _our_name(name: str, fused_weights: Mapping[str, tuple[str, str]]) -> tuple[str, str | None]:
    """What we call a checkpoint's tensor, and which part of ours it is."""
    *path, layer, kind = name.removeprefix("model.").split(".")
    ours, part = fused_weights.get(layer, (layer, None))
    return ".".join((*path, ours, kind)), part


def _parts(model: Model) -> Iterator[tuple[str, Weight, str | None]]:
    """Every tensor a checkpoint must have, and where it goes."""
    theirs = {target: name for name, target in model.fused_weights.items()}
    for our_name, weight in _weights(model).items():
        *path, layer, kind = our_name.split(".")
        prefix = () if our_name.startswith(("lm_head.", "score.")) else ("model",)
        for part in weight.pieces:
            name = layer if part is None else theirs[layer, part]
            yield ".".join((*prefix, *path, name, kind)), weight, part


def _dummy_tensors(model: Model) -> list[DummyTensor]:
    return [DummyTensor(name, weight.full_shape(part)) for name, weight, part in _parts(model)]


def _is_ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that hold no weight of their own."""
    has_lm_head = not (config.tie_word_embeddings or config.is_pooled)
    is_unused_head = name == "lm_head.weight" and not has_lm_head
    return is_unused_head or name.endswith("rotary_emb.inv_freq")


def _listed(problem: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return [f"{problem} {', '.join(names[:MAX_NAMES])}{more}"]


def _terminal_bar(checkpoint: Checkpoint, tp: TensorParallel) -> Progress:
    hidden_if = None if tp.rank == 0 else True  # None: where stderr is no terminal
    bar = tqdm(total=checkpoint.num_tensors, desc="weights", unit="tensor", disable=hidden_if)

    def show(num_loaded: int, num_tensors: int) -> None:
        bar.update(1)
        if num_loaded == num_tensors:
            bar.close()

    return show
