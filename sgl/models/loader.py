"""From a path to a model that is ready to run: config, network, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from sgl.errors import ConfigError
from sgl.kernels.collectives import TensorParallel
from sgl.models.checkpoint import (
    Checkpoint,
    LoadFormat,
    TensorHead,
    dummy_checkpoint,
    open_checkpoint,
)
from sgl.models.config import ModelConfig
from sgl.models.layers.weight_format import plain_format
from sgl.models.layers.weights import Placement
from sgl.models.pooling import Model, pooled
from sgl.models.registry import model_class
from sgl.models.weight_table import check_fit, full_name, is_ignored, weight_table

Progress: TypeAlias = Callable[[int, int], None]  # tensors loaded, tensors in all

DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


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
    check_quantization(config)
    torch_dtype = resolve_dtype(dtype, config, device)
    placement = Placement(tp, device, torch_dtype, plain_format(device, torch_dtype))
    model = _create(config, placement)
    checkpoint = open_weights(path, load_format, model, config, placement.empty(0))
    check_fit(weight_table(model), config, checkpoint)
    fill(model, config, checkpoint, progress or _terminal_bar(checkpoint, tp))
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


def open_weights(
    path: str | Path, load_format: LoadFormat, model: Model, config: ModelConfig, like: Tensor
) -> Checkpoint:
    """The weights of a checkpoint, or random ones; made on the device and in the type of `like`."""
    if load_format == "dummy":
        heads = [TensorHead(name, place.shape) for name, place in weight_table(model).items()]
        return dummy_checkpoint(heads, like.device, like.dtype)
    return open_checkpoint(Path(path), load_format, like.dtype, config.head_dim)


def fill(model: Model, config: ModelConfig, checkpoint: Checkpoint, progress: Progress) -> None:
    """Load every weight, the first time or once more; `check_fit` has found all of them.

    A linear layer is brought into the form that runs as soon as it is whole, so that one layer at
    most is held twice.
    """
    table = weight_table(model)
    for place in table.values():
        place.weight.reopen()
    for num_seen, (name, tensor) in enumerate(checkpoint.tensors, start=1):
        progress(num_seen, len(checkpoint.heads))
        if is_ignored(name, config):
            continue
        found = table.get(full_name(name))
        if found is None or tuple(tensor.shape) != found.shape:
            raise ConfigError(f"{checkpoint.source} has changed while it was read: {name}")
        found.weight.load(found.part, tensor)
        for linear in found.linears:
            if linear.is_loaded:
                linear.finish_loading()


def _create(config: ModelConfig, placement: Placement) -> Model:
    try:
        model = model_class(config.architecture)(config, placement)
        return pooled(model, config, placement) if config.is_pooled else model
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the weights do not fit on {placement.device}: use more GPUs (--tp-size) or a smaller "
            f"model; {str(error).partition('. ')[0]}"
        ) from None


def check_quantization(config: ModelConfig) -> None:
    """Raises ConfigError where the weights are in a format that nothing here multiplies."""
    if config.quantization is not None:
        raise ConfigError(
            f"the checkpoint is quantised with {config.quantization!r}, which is not supported: "
            "use the original checkpoint or a GGUF file of it"
        )


def _terminal_bar(checkpoint: Checkpoint, tp: TensorParallel) -> Progress:
    hidden_if = None if tp.rank == 0 else True  # None: where stderr is no terminal
    bar = tqdm(total=len(checkpoint.heads), desc="weights", unit="tensor", disable=hidden_if)

    def show(num_loaded: int, num_tensors: int) -> None:
        bar.update(1)
        if num_loaded == num_tensors:
            bar.close()

    return show
