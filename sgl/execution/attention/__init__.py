"""Attention back ends: `plan` once per step on the host, then `run` once per layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sgl.execution.kv_cache import KvCache
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import Outputs, StepLayout


class AttentionBackend(Protocol):
    """Axes: T tokens of the step    B requests of the step    H query heads    E head size
          W tokens whose output is wanted

    inputs_4T  the step's tokens on the device: their rows, positions, slots and ids
    """

    cache: KvCache

    def plan(self, layout: StepLayout, table: RequestTable, inputs_4T: Tensor) -> None:
        """Prepare for the step whose shape `layout` is; no device result is waited for."""

    def run(self, layer_id: int, q_THE: Tensor) -> Tensor:
        """Attend causally from every token to its request's KV, which is stored already."""

    def run_outputs(self, layer_id: int, q_THE: Tensor, outputs: Outputs) -> Tensor:
        """As `run`, but for these tokens alone: [W, H, E]."""


class RecordableBackend(AttentionBackend, Protocol):
    """One whose decode steps can be recorded in a CUDA graph: shapes depend on B alone.

    inputs_4B  as above
    """

    def num_variants(self, size: int) -> int:
        """How many graphs there may be of a batch size; they are numbered from 0."""

    def plan_decode(self, table: RequestTable, inputs_4B: Tensor, variant: int) -> None:
        """Prepare to record: `run` reads lengths from `inputs_4B` whenever it is replayed.

        The batch is made before, as for `plan`; the first call for a size is not recorded.
        """

    def can_replay(self, layout: StepLayout) -> bool:
        """Whether graphs can run a step of decodes; the answer may depend on its lengths."""

    def choose_variant(self, layout: StepLayout, table: RequestTable, size: int) -> int:
        """Which variant of the graph for `size` suits a step of decodes; prepares to replay it."""
