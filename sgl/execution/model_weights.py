"""The weights of a rank while it serves: replaced in place, and shown.

    UpdateWeights ──▶ check ──▶ all ranks agree? ──▶ load ──▶ all ranks agree? ──▶ Reply
                        │ no                           │ no
                        └─▶ nothing has changed        └─▶ load the old checkpoint again

Parameters keep their place in memory: recorded graphs go on reading them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields
from difflib import get_close_matches

import orjson
import torch
from torch import Tensor

from sgl.errors import ConfigError, InvalidRequestError
from sgl.kernels.collectives import TensorParallel
from sgl.messages import GetWeight, Reply, UpdateWeights
from sgl.models.checkpoint import Checkpoint, LoadFormat
from sgl.models.config import ModelConfig, RopeConfig
from sgl.models.loader import check_quantization, fill, open_weights
from sgl.models.pooling import Model
from sgl.models.weight_table import (
    EMBEDDING,
    LM_HEAD,
    Place,
    check_fit,
    full_name,
    weight_table,
)

logger = logging.getLogger(__name__)

MAX_NUMBERS = 2**23  # that one reply shows
NUM_NEAR_NAMES = 3
MAY_DIFFER = ("dtype",)  # weights are converted
OTHER_RANK = "another rank cannot load it: its log says why"


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights are from."""

    path: str
    load_format: LoadFormat


class ModelWeights:
    """Every rank must be given the same messages in the same order.

    source     what is loaded at the start
    overrides  entries that replace those of a checkpoint's config.json
    like       has the device and the type of the weights
    beat       shows that this process lives: loading takes longer than any step
    """

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        tp: TensorParallel,
        source: Source,
        *,
        overrides: Mapping[str, object],
        like: Tensor,
        beat: Callable[[], None],
    ) -> None:
        self._model = model
        self._config = config
        self._tp = tp
        self._source = source
        self._overrides = overrides
        self._like = like
        self._beat = beat

    def obey(self, message: UpdateWeights | GetWeight) -> Reply:
        """Update or show. Whatever is wrong with that is told, and harms nothing else."""
        try:
            if isinstance(message, GetWeight):
                return Reply(message.call_id, ok=True, text=self._show(message))
            return self._update(message)
        except InvalidRequestError as error:
            return Reply(message.call_id, ok=False, text=str(error))

    def _update(self, message: UpdateWeights) -> Reply:
        started = time.monotonic()
        wanted = Source(message.path, message.load_format)
        checkpoint, problem = self._checked(wanted)
        if not self._all(checkpoint is not None):
            logger.warning("The weights stay as they are: %s", problem or OTHER_RANK)
            return Reply(message.call_id, ok=False, text=problem or OTHER_RANK)
        assert checkpoint is not None
        problem = self._load(checkpoint)
        if not self._all(not problem):
            self._restore(problem or OTHER_RANK)
            text = f"{problem or OTHER_RANK}; the weights from before are loaded again"
            return Reply(message.call_id, ok=False, text=text)
        self._source = wanted
        text = f"Weights of {checkpoint.source} loaded in {time.monotonic() - started:.1f} s."
        logger.info("%s", text)
        return Reply(message.call_id, ok=True, text=text)

    def _checked(self, wanted: Source) -> tuple[Checkpoint | None, str]:
        """The checkpoint if it can replace what runs, else None and why. Overwrites nothing."""
        try:
            config = ModelConfig.load(
                wanted.path, self._overrides, is_embedding=self._config.is_pooled
            )
            check_quantization(config)
            _check_same(wanted.path, config, self._config)
            return self._open(wanted), ""
        except (ConfigError, OSError) as error:
            return None, str(error)

    def _open(self, source: Source) -> Checkpoint:
        checkpoint = open_weights(
            source.path, source.load_format, self._model, self._config, self._like
        )
        check_fit(weight_table(self._model), self._config, checkpoint)
        return checkpoint

    def _load(self, checkpoint: Checkpoint) -> str:
        """What went wrong in the middle; empty if nothing did."""
        try:
            fill(self._model, self._config, checkpoint, lambda num_loaded, num: self._beat())
        except (ConfigError, OSError, RuntimeError) as error:  # the file's, the disk's, or torch's
            return str(error)
        return ""

    def _restore(self, problem: str) -> None:
        """Load the old checkpoint again; without it there is nothing to serve."""
        logger.error("The weights are half replaced: %s; loading the old ones again", problem)
        problem = self._load(self._open(self._source))
        assert not problem, f"the weights from before cannot be loaded again: {problem}"

    def _all(self, is_fine: bool) -> bool:
        """Whether all ranks are fine."""
        return bool(self._tp.smallest(int(is_fine), self._like.device))

    def _show(self, wanted: GetWeight) -> str:
        place = self._find(wanted.name)
        shape = (min(wanted.max_rows, place.shape[0]), *place.shape[1:])
        if math.prod(shape) > MAX_NUMBERS:
            raise InvalidRequestError(
                f"{shape[0]} rows of {wanted.name} hold {math.prod(shape)} numbers, a reply may "
                f"hold {MAX_NUMBERS}: lower truncate_size",
                param="truncate_size",
            )
        rows = self._gather(place, shape).cpu().numpy()
        return orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY).decode()

    def _find(self, name: str) -> Place:
        table = weight_table(self._model)
        known = full_name(name)
        is_tied = self._config.tie_word_embeddings and not self._config.is_pooled
        if known == LM_HEAD and is_tied:
            known = EMBEDDING
        if known not in table:
            near = get_close_matches(known, table, NUM_NEAR_NAMES, cutoff=0.0)
            raise InvalidRequestError(
                f"the model has no weight {name!r:.200}; it has {', '.join(near)} and others",
                param="name",
            )
        return table[known]

    def _gather(self, place: Place, shape: tuple[int, ...]) -> Tensor:
        """The first rows of a weight, float32: every rank sends what it has of them."""
        axis, num_rows = place.weight.axis, shape[0]
        whole = torch.empty(shape, dtype=torch.float32, device=self._like.device)
        mine = place.values()[:num_rows].float().contiguous()
        for rank in range(self._tp.size):
            span = torch.tensor([place.piece.first, mine.shape[axis]], device=whole.device)
            first, num = self._tp.broadcast(span, rank).tolist()
            num = min(num, shape[axis] - first)
            if num > 0:
                is_mine = rank == self._tp.rank
                theirs = whole.narrow(axis, first, num)
                part = mine.narrow(axis, 0, num) if is_mine else torch.empty_like(theirs)
                theirs.copy_(self._tp.broadcast(part.contiguous(), rank))
        return whole


def _check_same(path: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    names = [field.name for field in fields(ModelConfig) if field.name not in MAY_DIFFER]
    for name in names:
        new, running = getattr(theirs, name), getattr(ours, name)
        if not _is_same(new, running):
            raise ConfigError(
                f"{path} is another model than the one that runs: its {name} is {new}, not "
                f"{running}; start a server with it instead"
            )


def _is_same(new: object, running: object) -> bool:
    """A GGUF file keeps numbers as float32."""
    if isinstance(new, float) and isinstance(running, float):
        return math.isclose(new, running, rel_tol=1e-6)
    if isinstance(new, RopeConfig) and isinstance(running, RopeConfig):
        pairs = zip(astuple(new), astuple(running), strict=True)
        return all(_is_same(*pair) for pair in pairs)
    return new == running
