"""Attention with our Triton kernels: split-KV for the decodes of a step, tiles for its chunks.

Axes: T tokens of the step    B requests of the step    D decodes, or room for them
      N rows of the prompts' plan    H query heads    E head size
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sgl.execution.attention.prefix_blocks import PrefixBlocks
from sgl.execution.kv_cache import KvCache
from sgl.execution.recorded_inputs import GraphShape, RecordedInputs
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import Outputs, StepLayout
from sgl.kernels.multiprocessors import num_cores
from sgl.kernels.triton_decode_attention import (
    SharedPrefixes,
    decode_attention,
    members_per_block,
    num_splits,
)
from sgl.kernels.triton_extend_attention import RunPlanner, choose_tile, extend_attention
from sgl.models.batch import AttentionSpec

MAX_PREFIX_SPLITS = 8
MAX_SHORT_RUNS = 32  # of a recorded step: ends of prompts, which fill no program
TYPICAL_SHARE = 8  # as many programs split a request as if an eighth of the requests decoded
MIN_SHARING = 8  # smaller batches read a shared prefix as often as they like


class TritonAttention:
    """A `RecordableBackend`: what its kernels need of a step is on the device.

    There are two variants of a recorded step: without shared prefixes, and with. One with prompts
    launches decode programs for as many requests as it has room for; those without a decode attend
    to padding, and the prompts' programs overwrite what they leave.
    """

    def __init__(self, layers: list[AttentionSpec], cache: KvCache) -> None:
        self.layers = layers
        self.cache = cache
        self.num_cores = num_cores(cache.keys_SKE[0].device)
        self.group_size = layers[0].num_heads // layers[0].num_kv_heads
        self.blocks = PrefixBlocks(cache.page_size, members_per_block(self.group_size))
        self.tile = choose_tile(layers[0].head_dim, cache.model_dtype)
        self.planner = RunPlanner(
            run_len=self.tile[0] // self.group_size,
            num_programs=max(1, self.num_cores // layers[0].num_kv_heads),
        )
        self.num_parts = 0
        self.splits = 1
        self.prefixes: SharedPrefixes | None = None
        self.uploaded: dict[int, SharedPrefixes] = {}  # version -> what the last step used
        self.recorded: dict[GraphShape, SharedPrefixes] = {}  # where the graph reads them
        self.recorded_version: dict[GraphShape, int] = {}  # what is written there
        self.pages_RP = self.decodes_2D = self.plan_N8 = torch.empty((0, 0))

    def plan(self, layout: StepLayout, table: RequestTable, inputs_4T: Tensor) -> None:
        num = layout.num_decodes
        self.pages_RP = table.device_pages_RP
        self.decodes_2D = inputs_4T[:2, :num]
        self.splits = self._num_splits(num)
        self.prefixes = self._shared_prefixes(layout, table)
        plan_N8 = self.prompt_plan(layout)
        self.plan_N8 = table.to_device(plan_N8)
        has_parts = plan_N8[: self.planner.max_merges].any()
        self.num_parts = self.planner.num_programs if has_parts else 0

    def max_plan_rows(self, num_tokens: int) -> int:
        return self.planner.max_rows(num_tokens, num_short=MAX_SHORT_RUNS)

    def prompt_plan(self, layout: StepLayout) -> np.ndarray:
        num = layout.num_decodes
        if num == len(layout.rows_B):
            return np.zeros((0, 8), np.int32)
        # the decodes' tokens come first
        lens_B = layout.query_lens_B[num:], (layout.kv_lens_B - layout.query_lens_B)[num:]
        return self.planner.plan(layout.rows_B[num:], *lens_B, first_token=num)

    def num_variants(self, shape: GraphShape) -> int:
        return 2 if shape.num_outputs >= MIN_SHARING else 1

    def plan_recorded(self, table: RequestTable, inputs: RecordedInputs, variant: int) -> None:
        shape = inputs.shape
        self.pages_RP = table.device_pages_RP
        self.decodes_2D, self.plan_N8 = inputs.decodes_2W, inputs.plan_N8
        self.num_parts = self.planner.num_programs
        self.splits = self._num_splits(
            shape.num_outputs // (TYPICAL_SHARE if shape.has_prompts else 1)
        )
        self.prefixes = self._recordable_prefixes(shape, table) if variant == 1 else None

    def can_replay(self, layout: StepLayout) -> bool:
        return True

    def choose_variant(self, layout: StepLayout, table: RequestTable, shape: GraphShape) -> int:
        if self.num_variants(shape) == 1:
            return 0
        self.blocks.update(layout, table)
        found, target = self.blocks, self.recorded[shape]
        if not 0 < len(found.blocks) <= len(target.blocks):
            return 0
        if self.recorded_version.get(shape) != found.version:
            self.recorded_version[shape] = found.version
            for tensor, values in ((target.lens_B, found.lens_B), (target.blocks, found.blocks)):
                tensor.zero_()
                tensor[: len(values)].copy_(table.to_device(values))
        return 1

    def run(self, layer_id: int, q_THE: Tensor) -> Tensor:
        """[T, H, E] -> [T, H, E]."""
        spec, (rows_D, positions_D) = self.layers[layer_id], self.decodes_2D
        out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
        keys, values = self.cache.keys_SKE[layer_id], self.cache.values_SKE[layer_id]
        if num := len(rows_D):
            decode_attention(
                q_THE[:num],
                keys,
                values,
                self.pages_RP,
                rows_D,
                positions_D,
                out_THE[:num],
                page_size=self.cache.page_size,
                scale=spec.scale,
                window=spec.window,
                soft_cap=spec.soft_cap,
                splits=self.splits,
                prefixes=None if spec.window else self.prefixes,
            )
        if len(self.plan_N8):
            extend_attention(
                q_THE,
                keys,
                values,
                self.pages_RP,
                self.plan_N8,
                out_THE,
                num_merges=self.planner.max_merges,
                num_parts=self.num_parts,
                page_size=self.cache.page_size,
                scale=spec.scale,
                window=spec.window,
                soft_cap=spec.soft_cap,
                tile=self.tile,
            )
        return out_THE

    def run_outputs(self, layer_id: int, q_THE: Tensor, outputs: Outputs) -> Tensor:
        """One query a request: whatever the step is, these are decodes."""
        spec, q_WHE = self.layers[layer_id], q_THE.index_select(0, outputs.tokens_W)
        out_WHE = torch.empty_like(q_WHE)
        if len(q_WHE):
            decode_attention(
                q_WHE,
                self.cache.keys_SKE[layer_id],
                self.cache.values_SKE[layer_id],
                self.pages_RP,
                outputs.rows_W,
                outputs.positions_W,
                out_WHE,
                page_size=self.cache.page_size,
                scale=spec.scale,
                window=spec.window,
                soft_cap=spec.soft_cap,
                splits=self._num_splits(len(q_WHE)),
            )
        return out_WHE

    def _num_splits(self, num_decodes: int) -> int:
        return num_splits(num_decodes, self.layers[0].num_kv_heads, self.num_cores)

    def _shared_prefixes(self, layout: StepLayout, table: RequestTable) -> SharedPrefixes | None:
        """Those of a step that is not recorded."""
        self.blocks.update(layout, table)
        if not len(self.blocks.blocks):
            return None
        if self.blocks.version not in self.uploaded:
            self.uploaded = {
                self.blocks.version: SharedPrefixes(
                    table.to_device(self.blocks.lens_B),
                    table.to_device(self.blocks.blocks),
                    self._num_prefix_splits(len(self.blocks.blocks)),
                )
            }
        return self.uploaded[self.blocks.version]

    def _recordable_prefixes(self, shape: GraphShape, table: RequestTable) -> SharedPrefixes:
        """Room for as many blocks as usually matter; a step with more runs without them."""
        num_blocks = max(1, shape.num_outputs // 4)
        width = 2 + self.blocks.members_per_block
        lens_B = torch.zeros(shape.num_outputs, dtype=torch.int32, device=table.device)
        blocks = torch.zeros((num_blocks, width), dtype=torch.int32, device=table.device)
        fresh = SharedPrefixes(lens_B, blocks, self._num_prefix_splits(num_blocks))
        return self.recorded.setdefault(shape, fresh)

    def _num_prefix_splits(self, num_blocks: int) -> int:
        """One of two numbers, as each is compiled for."""
        is_much = num_blocks * self.layers[0].num_kv_heads > 2 * self.num_cores
        return 1 if is_much else MAX_PREFIX_SPLITS
