"""Every weight of a model under the name that checkpoints have for it.

model.layers.0.self_attn.k_proj.weight ──▶ layers.0.self_attn.qkv_proj.weight, part "k"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from sgl.errors import ConfigError
from sgl.models.checkpoint import Checkpoint, TensorHead
from sgl.models.config import ModelConfig
from sgl.models.layers.linear import Linear
from sgl.models.layers.weights import Piece, Weight
from sgl.models.pooling import Model

PREFIX = "model."
HEADS = ("lm_head.", "score.")  # beside the layers, without the prefix
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FLOAT_KINDS = ("F64", "F32", "F16", "BF16")
MAX_NAMES = 6  # that one error message lists


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint goes.

    kind     the weight's name in its layer, "weight" or "bias"
    linears  layers that are made of it; they must be finished once it is loaded
    """

    weight: Weight
    part: str | None
    kind: str
    linears: tuple[Linear, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.full_shape(self.part)

    @property
    def piece(self) -> Piece:
        return self.weight.pieces[self.part]

    def values(self) -> Tensor:
        """This rank's entries, as they were loaded."""
        whole = self.weight.data
        if not self.weight.has_memory:
            [linear] = self.linears
            whole = linear.format.original(linear.weights)[self.kind]
        return whole.narrow(self.weight.axis, self.piece.at, self.piece.num)


WeightTable: TypeAlias = "Mapping[str, Place]"


def weight_table(model: Model) -> WeightTable:
    """The tensors a checkpoint must have, in the order of the model."""
    theirs = {target: name for name, target in model.fused_weights.items()}
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    table = {}
    for our_name, weight in model.named_parameters():
        assert isinstance(weight, Weight), f"{our_name} does not say how it is loaded"
        *path, layer, kind = our_name.split(".")
        prefix = "" if our_name.startswith(HEADS) else PREFIX
        users = tuple(linear for linear in linears if _is_made_of(linear, weight))
        for part in weight.pieces:
            name = layer if part is None else theirs[layer, part]
            table[prefix + ".".join((*path, name, kind))] = Place(weight, part, kind, users)
    return table


def full_name(name: str) -> str:
    """A tensor's name as in the table: some checkpoints leave the prefix out."""
    return name if name.startswith((PREFIX, *HEADS)) else PREFIX + name


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that hold no weight of their own."""
    has_lm_head = not (config.tie_word_embeddings or config.is_pooled)
    is_unused_head = name == LM_HEAD and not has_lm_head
    return is_unused_head or name.endswith("rotary_emb.inv_freq")


def check_fit(table: WeightTable, config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raises a ConfigError that names the tensors which are absent, too many or of a wrong shape.

    Nothing but their names, shapes and types is read.
    """
    heads = [head for head in checkpoint.heads if not is_ignored(head.name, config)]
    found = {full_name(head.name) for head in heads}
    missing = [name for name in table if name not in found]
    unexpected = [head.name for head in heads if full_name(head.name) not in table]
    problems = _listed("it lacks", missing) + _listed("the model has no", unexpected)
    if problems:
        raise ConfigError(
            f"{checkpoint.source} does not fit {config.architecture}: {'; '.join(problems)}; "
            "check that the weights and config.json belong together"
        )
    _check_once(heads, checkpoint.source)
    for head in heads:
        _check_head(head, table[full_name(head.name)].shape, checkpoint.source)


def _check_once(heads: Iterable[TensorHead], source: str) -> None:
    seen: set[str] = set()
    for head in heads:
        name = full_name(head.name)
        if name in seen:
            raise ConfigError(
                f"{source} has {head.name} twice: remove the file that is not part of it"
            )
        seen.add(name)


def _check_head(head: TensorHead, shape: tuple[int, ...], source: str) -> None:
    if head.shape != shape:
        raise ConfigError(
            f"{source}: {head.name} has the shape {head.shape} where the config asks for "
            f"{shape}; check that the weights and config.json belong together"
        )
    if head.kind not in FLOAT_KINDS:
        raise ConfigError(
            f"{source}: {head.name} is of type {head.kind}, not one of {', '.join(FLOAT_KINDS)}: "
            "it is quantised in a way its config.json does not tell; use the original checkpoint"
        )


def _is_made_of(linear: Linear, weight: Weight) -> bool:
    parts = [*linear.loaded.values(), *([] if linear.bias is None else [linear.bias])]
    return any(part is weight for part in parts)


def _listed(problem: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return [f"{problem} {', '.join(names[:MAX_NAMES])}{more}"]
