"""Decode steps recorded as CUDA graphs, one for each of a few batch sizes.

    inputs_4T ── one copy ──▶ │ token ids ▸ layers ▸ logits ▸ best tokens ▸ request table │
                              └─────────────────── one launch ───────────────────────────┘

A batch is filled up to the next size with tokens of a row and a page that nobody else has. What
differs from step to step (rows, positions, slots) is read on the device, so a graph never changes.

Axes: B requests of the step    T tokens it is filled up to    S the largest T    V vocabulary
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
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import StepLayout, padded_len
from sgl.kernels.collectives import TensorParallel
from sgl.kernels.step_tokens import best_tokens
from sgl.models.batch import CausalLM

logger = logging.getLogger(__name__)

MAX_WASTE = 0.12  # of a filled-up batch, at most
LARGE_BATCH = 256  # from here on matrix products are bound by arithmetic, not by reading weights


@dataclass(frozen=True, slots=True)
class Recording:
    """A graph and where it leaves its results, which the next graph's replay overwrites.

    logits_TV  of this rank's part of the vocabulary
    """

    graph: torch.cuda.CUDAGraph
    logits_TV: Tensor
    ids_T: Tensor


class DecodeGraphs:
    """Records at start-up, largest first, so that the smaller graphs fit into the same memory."""

    def __init__(
        self,
        model: CausalLM,
        table: RequestTable,
        attention: RecordableBackend,
        tp: TensorParallel,
        sizes: list[int],
    ) -> None:
        self.model = model
        self.table = table
        self.attention = attention
        self.tp = tp
        self.sizes = sizes
        self.padding_4S = self._padding()
        self.inputs_4S = table.to_device(self.padding_4S)
        self.recordings: dict[tuple[int, int], Recording] = {}  # by size and variant

    def can_run(self, layout: StepLayout) -> bool:
        """Whether the step is nothing but decodes, and not too many or too long."""
        is_small = len(layout.rows_B) == layout.num_decodes <= self.sizes[-1]
        return is_small and self.attention.can_replay(layout)

    @torch.inference_mode()
    def record(self) -> None:
        started = time.monotonic()
        free_before, _ = torch.cuda.mem_get_info(self.table.device)
        pool = torch.cuda.graph_pool_handle()
        # one stream for all: the allocator keeps memory for each stream apart
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for size in reversed(self.sizes):
            for variant in range(self.attention.num_variants(size)):
                self.recordings[size, variant] = self._record(size, variant, pool, stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.table.device)
        logger.info(
            "Recorded %d CUDA graphs for up to %d requests in %.1f s; they take %.2f GiB",
            len(self.recordings),
            self.sizes[-1],
            time.monotonic() - started,
            (free_before - free) / 2**30,
        )

    def run(self, inputs_4B: np.ndarray, layout: StepLayout) -> tuple[Tensor, Tensor]:
        """Launch a step: logits [B, V] and best tokens [B], overwritten by the next."""
        num = layout.num_tokens
        size = next(size for size in self.sizes if size >= num)
        variant = self.attention.choose_variant(layout, self.table, size)
        filled_4S = self.padding_4S.copy()
        filled_4S[:, :num] = inputs_4B[:, :num]
        pinned_4S = torch.from_numpy(filled_4S).pin_memory()
        self.inputs_4S.copy_(pinned_4S, non_blocking=True)
        recording = self.recordings[size, variant]
        recording.graph.replay()
        return recording.logits_TV[:num], recording.ids_T[:num]

    def _record(self, size: int, variant: int, pool: Any, stream: torch.cuda.Stream) -> Recording:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(size, variant)  # compiles kernels and fills libraries' caches
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):  # other threads may ask the device something meanwhile, NCCL's does
            logits_TV, ids_T = self._step(size, variant)
        return Recording(graph, _alias(logits_TV), _alias(ids_T))

    def _step(self, size: int, variant: int) -> tuple[Tensor, Tensor]:
        inputs_4T = self.inputs_4S[:, :size]
        batch = ForwardBatch(inputs_4T, self.table, self.attention)
        self.attention.plan_decode(self.table, inputs_4T, variant)
        logits_TV = self.model.logits(self.model.hidden(batch))
        return logits_TV, best_tokens(logits_TV, inputs_4T[0], self.table.last_token_R, self.tp)

    def _padding(self) -> np.ndarray:
        """Inputs of tokens that belong to nobody, for the largest size: int32 [4, S]."""
        slot = self.attention.cache.padding_page * self.attention.cache.page_size
        column = np.array([[self.table.padding_row], [0], [slot], [0]], np.int32)
        return np.repeat(column, padded_len(self.sizes[-1]), axis=1)


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
