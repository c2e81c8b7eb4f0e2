"""Attention with our Triton kernels: split-KV for the decodes of a step, tiles for its chunks.

Axes: T tokens of the step    B requests of the step    H query heads    E head size
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgl.execution.kv_cache import KvCache
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import StepLayout
from sgl.kernels.triton_decode_attention import decode_attention, num_splits
from sgl.kernels.triton_extend_attention import extend_attention, plan_runs
from sgl.models.batch import AttentionSpec


class TritonAttention:
    """A `RecordableBackend`: what its decode kernel needs of a step is on the device."""

    def __init__(self, layers: list[AttentionSpec], cache: KvCache) -> None:
        self.layers = layers
        self.cache = cache
        self.num_cores = _num_cores(cache.keys_SKE[0].device)
        self.group_size = layers[0].num_heads // layers[0].num_kv_heads
        self.num_decodes = 0
        self.splits = 1
        self.pages_RP = self.rows_T = self.positions_T = self.runs_N4 = torch.empty(0)

    def plan(self, layout: StepLayout, table: RequestTable, inputs_4T: Tensor) -> None:
        self.plan_decode(table, inputs_4T)
        self.num_decodes = num = layout.num_decodes
        self.splits = self._num_splits(num)
        starts_B = layout.kv_lens_B - layout.query_lens_B
        runs_N4 = plan_runs(
            layout.rows_B[num:], layout.query_lens_B[num:], starts_B[num:], self.group_size
        )
        self.runs_N4 = table.to_device(runs_N4)

    def plan_decode(self, table: RequestTable, inputs_4B: Tensor) -> None:
        self.pages_RP = table.device_pages_RP
        self.rows_T, self.positions_T = inputs_4B[0], inputs_4B[1]
        self.num_decodes = inputs_4B.shape[1]
        self.splits = self._num_splits(self.num_decodes)

    def run(self, layer_id: int, q_THE: Tensor) -> Tensor:
        """[T, H, E] -> [T, H, E]."""
        spec, num = self.layers[layer_id], self.num_decodes
        out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
        keys, values = self.cache.keys_SKE[layer_id], self.cache.values_SKE[layer_id]
        if num:
            decode_attention(
                q_THE[:num],
                keys,
                values,
                self.pages_RP,
                self.rows_T[:num],
                self.positions_T[:num],
                out_THE[:num],
                page_size=self.cache.page_size,
                scale=spec.scale,
                window=spec.window,
                soft_cap=spec.soft_cap,
                splits=self.splits,
            )
        if num < len(q_THE):
            extend_attention(
                q_THE[num:],
                keys,
                values,
                self.pages_RP,
                self.runs_N4,
                out_THE[num:],
                page_size=self.cache.page_size,
                scale=spec.scale,
                window=spec.window,
                soft_cap=spec.soft_cap,
            )
        return out_THE

    def _num_splits(self, num_decodes: int) -> int:
        return num_splits(num_decodes, self.layers[0].num_kv_heads, self.num_cores)


def _num_cores(device: torch.device) -> int:
    """Multiprocessors; where kernels are interpreted, a few."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
