"""Steps recorded as CUDA graphs, one for each of a few shapes.

    inputs ── one copy ──▶ │ token ids ▸ layers ▸ logits ▸ best tokens ▸ request table │
                           └─────────────────── one launch ───────────────────────────┘

A step of decodes is filled up to the next batch size, one with prompts to the next number of
tokens, with tokens of a row and a page that nobody else has. What differs from step to step (rows,
positions, slots, where prompts begin) is read on the device, so a graph never changes. Steps of
thousands of tokens are not recorded: they take longer than the launches of their kernels.

Axes: B requests of the step    W room for those that get a token    V vocabulary
      N rows of the prompts' plan
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgl.execution.attention import RecordableBackend
from sgl.execution.forward_batch import ForwardBatch
from sgl.execution.recorded_inputs import GraphShape, RecordedInputs
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import StepLayout
from sgl.kernels.collectives import TensorParallel
from sgl.kernels.step_tokens import best_tokens
from sgl.models.batch import CausalLM

logger = logging.getLogger(__name__)

MAX_WASTE = 0.12  # of a filled-up batch, at most
LARGE_BATCH = 256  # from here on matrix products are bound by arithmetic, not by reading weights
PROMPT_TILE = 64  # tokens; smaller steps with prompts take as long


@dataclass(frozen=True, slots=True)
class Recording:
    """A graph and where it leaves its results, which the next graph's replay overwrites.

    logits_WV  of this rank's part of the vocabulary
    """

    graph: torch.cuda.CUDAGraph
    logits_WV: Tensor
    ids_W: Tensor


class StepGraphs:
    """Records at start-up, largest first, so that the smaller graphs fit into the same memory."""

    def __init__(
        self,
        model: CausalLM,
        table: RequestTable,
        attention: RecordableBackend,
        tp: TensorParallel,
        shapes: list[GraphShape],
    ) -> None:
        """`shapes` with the smallest first."""
        self.model = model
        self.table = table
        self.attention = attention
        self.tp = tp
        padding_slot = attention.cache.padding_page * attention.cache.page_size
        self.inputs = {shape: RecordedInputs(shape, table, padding_slot) for shape in shapes}
        self.max_tokens = max(shape.num_tokens for shape in shapes)
        self.recordings: dict[tuple[GraphShape, int], Recording] = {}  # by shape and variant

    @torch.inference_mode()
    def record(self) -> None:
        started = time.monotonic()
        free_before, _ = torch.cuda.mem_get_info(self.table.device)
        pool = torch.cuda.graph_pool_handle()
        # one stream for all: the allocator keeps memory for each stream apart
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for shape in sorted(self.inputs, reverse=True):
            for variant in range(self.attention.num_variants(shape)):
                self.recordings[shape, variant] = self._record(shape, variant, pool, stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.table.device)
        logger.info(
            "Recorded %d CUDA graphs for up to %d requests, with prompts %d tokens, in %.1f s; "
            "they take %.2f GiB",
            len(self.recordings),
            max((shape.num_tokens for shape in self.inputs if not shape.has_prompts), default=0),
            max((shape.num_tokens for shape in self.inputs if shape.has_prompts), default=0),
            time.monotonic() - started,
            (free_before - free) / 2**30,
        )

    def launch(
        self, inputs_4B: np.ndarray, layout: StepLayout, sampled: np.ndarray
    ) -> tuple[Tensor, Tensor] | None:
        """Launch a step if it fits into a recorded one, else None.

        Logits and best tokens of the `sampled` requests, which the next step overwrites.
        """
        if layout.num_tokens > self.max_tokens or not self.attention.can_replay(layout):
            return None
        plan_N8 = self.attention.prompt_plan(layout)
        shape = self._smallest(layout, len(sampled), plan_N8)
        if shape is None:
            return None
        variant = self.attention.choose_variant(layout, self.table, shape)
        self.inputs[shape].fill(inputs_4B, layout, sampled, plan_N8)
        recording = self.recordings[shape, variant]
        recording.graph.replay()
        return recording.logits_WV[: len(sampled)], recording.ids_W[: len(sampled)]

    def _smallest(
        self, layout: StepLayout, num_sampled: int, plan_N8: np.ndarray
    ) -> GraphShape | None:
        """The first shape that the step fits into, if it does not fill up too much."""
        has_prompts = layout.num_decodes < len(layout.rows_B)
        most_tokens = layout.num_tokens + max(2 * PROMPT_TILE, layout.num_tokens // 4)
        for shape in self.inputs:
            if (
                shape.has_prompts == has_prompts
                and layout.num_tokens <= shape.num_tokens
                and num_sampled <= shape.num_outputs
                and len(plan_N8) <= shape.num_plan_rows
            ):
                return shape if shape.num_tokens <= most_tokens else None
        return None

    def _record(
        self, shape: GraphShape, variant: int, pool: Any, stream: torch.cuda.Stream
    ) -> Recording:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(shape, variant)  # compiles kernels and fills libraries' caches
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):  # other threads may ask the device something meanwhile, NCCL's does
            logits_WV, ids_W = self.step(shape, variant)
        return Recording(graph, _alias(logits_WV), _alias(ids_W))

    def step(self, shape: GraphShape, variant: int) -> tuple[Tensor, Tensor]:
        """What is recorded: logits and best tokens of the step that the inputs hold."""
        inputs = self.inputs[shape]
        batch = ForwardBatch(inputs.tokens_4T, self.table, self.attention, inputs.outputs)
        self.attention.plan_recorded(self.table, inputs, variant)
        logits_WV = self.model.logits(self.model.hidden(batch))
        rows_W = inputs.tokens_4T[0] if inputs.outputs is None else inputs.outputs.rows_W
        return logits_WV, best_tokens(logits_WV, rows_W, self.table.last_token_R, self.tp)


class _Memory:
    """Device memory that somebody else owns."""

    def __init__(self, tensor: Tensor, type_code: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": type_code,
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _alias(tensor: Tensor) -> Tensor:
    """The same memory without owning it: it belongs to the graphs' pool, where the graphs of other
    sizes may use it again. To own the logits of every size would take gigabytes."""
    type_code = {torch.float32: "<f4", torch.int64: "<i8"}[tensor.dtype]
    return torch.as_tensor(_Memory(tensor, type_code), device=tensor.device)


def graph_sizes(max_size: int) -> list[int]:
    """Batch sizes so close that filling up to the next wastes at most `MAX_WASTE` of it.

    Large ones are whole tiles of the matrix kernels, whose time grows tile by tile: a batch that is
    filled up to the end of its last tile costs no more.
    """
    sizes, size = [], 1
    while size < max_size:
        sizes.append(size)
        if size < LARGE_BATCH:
            size = min(max(size + 1, int((size + 1) / (1 - MAX_WASTE))), LARGE_BATCH)
        else:
            size += 32 << (size // LARGE_BATCH).bit_length() - 1
    return [*sizes, max_size]


def prompt_sizes(max_tokens: int) -> list[int]:
    """Numbers of tokens that steps with prompts are recorded for: whole tiles."""
    sizes, size = [], PROMPT_TILE
    while size < max_tokens:
        sizes.append(size)
        size += PROMPT_TILE if size < 1024 else 2 * PROMPT_TILE
    return [*sizes, max_tokens] if max_tokens else []


def recorded_shapes(
    attention: RecordableBackend, max_decodes: int, max_tokens: int
) -> list[GraphShape]:
    """Steps to be recorded, the smallest first.

    max_decodes  of a step without prompts
    max_tokens   of a step with prompts
    """
    decodes = [GraphShape(size, size) for size in graph_sizes(max_decodes)] if max_decodes else []
    prompts = [
        GraphShape(size, max_outputs(size), attention.max_plan_rows(size))
        for size in prompt_sizes(max_tokens)
    ]
    return decodes + [shape for shape in prompts if shape.has_prompts]


def max_outputs(num_tokens: int) -> int:
    """Of a step with prompts: how many of its requests may get a token."""
    return min(num_tokens, max(512, num_tokens // 2))
