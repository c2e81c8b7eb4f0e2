"""Attention with the kernels of flashinfer, which are compiled at the first start.

    host     lengths ──▶ plan of the step, one for each kind of layer ── copied by flashinfer ─┐
    device   page table ──▶ pages of all requests end to end ──▶ kernels of every layer  ◀─────┘

Chunks run on FlashAttention 3 where there is a Hopper GPU and 16-bit KV, else on FlashAttention 2;
decodes on its tensor-core kernels. A prefix that requests share is read by each of them: where that
matters, the Triton back end is the one to use.

Axes: T tokens of the step    B requests of the step    H query heads    E head size
      N pages of all B requests
"""

from __future__ import annotations

import logging
import time
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sgl.execution.attention.flashinfer_kernels import (
    HostPages,
    LayerKernels,
    num_pages,
    offsets,
    recorded_workspace_bytes,
    unrecorded_workspace_bytes,
)
from sgl.execution.kv_cache import KvCache
from sgl.execution.recorded_inputs import GraphShape, RecordedInputs
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import Outputs, StepLayout
from sgl.kernels.multiprocessors import num_cores
from sgl.kernels.page_lists import PageLists, write_page_lists
from sgl.models.batch import AttentionSpec

logger = logging.getLogger(__name__)

SHARING = 8  # room in graphs for this many requests that have the same page, on average


class FlashinferAttention:
    """A `RecordableBackend`: a graph lists the pages itself, and is planned before each replay.
    Steps with prompts are not recorded.

    library  the module `flashinfer`
    """

    def __init__(
        self,
        layers: list[AttentionSpec],
        cache: KvCache,
        library: ModuleType,
    ) -> None:
        self.layers = layers
        self.cache = cache
        self.device = cache.keys_SKE[0].device
        self.num_cores = num_cores(self.device)
        self.paged = [
            (_in_pages(keys_SKE, cache.page_size), _in_pages(values_SKE, cache.page_size))
            for keys_SKE, values_SKE in zip(cache.keys_SKE, cache.values_SKE, strict=True)
        ]
        specs = list(dict.fromkeys(layers))
        num_bytes = max(unrecorded_workspace_bytes(spec, self.num_cores) for spec in specs)
        self.workspace = self._zeros(num_bytes)
        self.kernels = {spec: LayerKernels(library, spec, cache, self.workspace) for spec in specs}
        self.recorded_lists: dict[int, PageLists] = {}  # by batch size
        self.recorded_indices_N = torch.empty(0, dtype=torch.int32, device=self.device)
        self.num_decodes = 0
        self._compile()

    def plan(self, layout: StepLayout, table: RequestTable, inputs_4T: Tensor) -> None:
        num = layout.num_decodes
        indices_N = self._list_pages(layout, table)
        self.num_decodes = num
        decodes = self._host_pages(layout.kv_lens_B[:num])
        if num:
            for kernels in self.kernels.values():
                kernels.plan_decode(decodes, indices_N[: decodes.total])
        if num < len(layout.rows_B):
            query_indptr_B = offsets(layout.query_lens_B[num:], self.device)
            chunks = self._host_pages(layout.kv_lens_B[num:])
            for kernels in self.kernels.values():
                kernels.plan_prefill(query_indptr_B, chunks, indices_N[decodes.total :])

    def max_plan_rows(self, num_tokens: int) -> int:
        return 0

    def prompt_plan(self, layout: StepLayout) -> np.ndarray:
        return np.zeros((0, 8), np.int32)

    def num_variants(self, shape: GraphShape) -> int:
        return 1

    def plan_recorded(self, table: RequestTable, inputs: RecordedInputs, variant: int) -> None:
        self.num_decodes = size = inputs.shape.num_tokens
        if size not in self.recorded_lists:
            self._add_recorded(size, table)
        for kernels in self.kernels.values():
            kernels.decode = kernels.recorded[size]
        rows_B, positions_B = inputs.decodes_2W
        lists = self.recorded_lists[size]
        write_page_lists(table.device_pages_RP, rows_B, positions_B, self.cache.page_size, lists)

    def can_replay(self, layout: StepLayout) -> bool:
        total = num_pages(layout.kv_lens_B, self.cache.page_size).sum()
        return int(total) <= len(self.recorded_indices_N) - max(self.recorded_lists)

    def choose_variant(self, layout: StepLayout, table: RequestTable, shape: GraphShape) -> int:
        kv_lens_B = np.ones(shape.num_tokens, np.int64)
        kv_lens_B[: len(layout.kv_lens_B)] = layout.kv_lens_B
        # only the plan is copied to the device, so these need no pinned memory
        pages = HostPages.of(kv_lens_B, self.cache.page_size, torch.device("cpu"))
        for kernels in self.kernels.values():
            kernels.plan_recorded(pages, self.recorded_indices_N)
        return 0

    def run(self, layer_id: int, q_THE: Tensor) -> Tensor:
        """[T, H, E] -> [T, H, E]."""
        kernels, paged = self.kernels[self.layers[layer_id]], self.paged[layer_id]
        num = self.num_decodes
        out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
        if num:
            kernels.decode.run(q_THE[:num], paged, out_THE[:num])
        if num < len(q_THE):
            kernels.prefill.run(q_THE[num:], paged, out_THE[num:])
        return out_THE

    def run_outputs(self, layer_id: int, q_THE: Tensor, outputs: Outputs) -> Tensor:
        return self.run(layer_id, q_THE).index_select(0, outputs.tokens_W)

    def _list_pages(self, layout: StepLayout, table: RequestTable) -> Tensor:
        """The pages of all requests of a step that is not recorded, int32 [N]."""
        total = int(num_pages(layout.kv_lens_B, self.cache.page_size).sum())
        indices_N = torch.empty(total, dtype=torch.int32, device=self.device)
        rows_B = table.to_device(layout.rows_B.astype(np.int32))
        positions_B = table.to_device((layout.kv_lens_B - 1).astype(np.int32))
        lists = PageLists.empty(len(layout.rows_B), indices_N)
        write_page_lists(table.device_pages_RP, rows_B, positions_B, self.cache.page_size, lists)
        return indices_N

    def _add_recorded(self, size: int, table: RequestTable) -> None:
        if not len(self.recorded_indices_N):
            self.recorded_indices_N = self._room_for_pages(table)
        num_bytes = max(
            recorded_workspace_bytes(spec, self.num_cores, size) for spec in self.kernels
        )
        if num_bytes > len(self.workspace):
            self.workspace = self._zeros(num_bytes)
        lists = self.recorded_lists[size] = PageLists.empty(size, self.recorded_indices_N)
        for kernels in self.kernels.values():
            kernels.add_recorded(lists, self.workspace)

    def _room_for_pages(self, table: RequestTable) -> Tensor:
        """For the pages of any graph's requests: with many sharers more than the cache has."""
        max_rows, max_pages = table.pages_RP.shape
        num = min(max_rows * max_pages, SHARING * self.cache.padding_page) + max_rows
        return torch.empty(num, dtype=torch.int32, device=self.device)

    def _host_pages(self, kv_lens_B: np.ndarray) -> HostPages:
        return HostPages.of(kv_lens_B, self.cache.page_size, self.device)

    def _zeros(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)

    def _compile(self) -> None:
        """Plan a step of one token: flashinfer compiles what it has no binary of."""
        logger.info("Loading flashinfer's kernels; to compile them takes a minute or two")
        started = time.monotonic()
        one = self._host_pages(np.ones(1, np.int64))
        index = torch.full((1,), self.cache.padding_page, dtype=torch.int32, device=self.device)
        for kernels in self.kernels.values():
            kernels.plan_decode(one, index)
            kernels.plan_prefill(one.indptr_B, one, index)
        logger.info("Loaded flashinfer's kernels in %.1f s", time.monotonic() - started)


def _in_pages(x_SKE: Tensor, page_size: int) -> Tensor:
    """[S, K, E] as pages of slots."""
    return x_SKE.view(-1, page_size, *x_SKE.shape[1:])
