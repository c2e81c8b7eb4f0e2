"""Attention back ends: `plan` once per step on the host, then `run` once per layer."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from sgl.execution.kv_cache import KvCache
from sgl.execution.recorded_inputs import GraphShape, RecordedInputs
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
    """One whose steps can be recorded in a CUDA graph: launches depend on a step's shape alone."""

    def max_plan_rows(self, num_tokens: int) -> int:
        """Rows that the plan of a recorded step's prompts may have; 0: steps with prompts cannot be
        recorded."""

    def prompt_plan(self, layout: StepLayout) -> np.ndarray:
        """How to divide the work on a step's prompts, int32 [N, 8], empty if there are none. What
        the numbers mean is the back end's affair; rows of zeros change nothing."""

    def num_variants(self, shape: GraphShape) -> int:
        """How many graphs there may be of a shape; they are numbered from 0."""

    def plan_recorded(self, table: RequestTable, inputs: RecordedInputs, variant: int) -> None:
        """Prepare to record: `run` reads the step from `inputs` whenever it is replayed.

        The batch is made before, as for `plan`; the first call for a shape is not recorded.
        """

    def can_replay(self, layout: StepLayout) -> bool:
        """Whether graphs can run a step; the answer may depend on its lengths."""

    def choose_variant(self, layout: StepLayout, table: RequestTable, shape: GraphShape) -> int:
        """Which variant of the graph suits a step; prepares to replay it."""
