"""What a recorded step reads: one piece of device memory, which one copy fills before a replay.

    │ tokens_4T: row, position, slot, id │ decodes_2W: row, position │ outputs_3W │ plan_N8 │
                                         └────────── only where there are prompts ──────────┘

What a step leaves over is filled up with a row and a page that nobody has.

Axes: T tokens    W requests that get a token    N rows of the prompts' plan    (room for so many)
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import Outputs, StepLayout, padded_len


class GraphShape(NamedTuple):
    """How much fits into a recorded step.

    num_tokens     T
    num_outputs    W; decodes are among them
    num_plan_rows  N, 0 where there are only decodes
    """

    num_tokens: int
    num_outputs: int
    num_plan_rows: int = 0

    @property
    def has_prompts(self) -> bool:
        return self.num_plan_rows > 0


Array = TypeVar("Array", np.ndarray, Tensor)


class _Views(NamedTuple, Generic[Array]):
    """The parts of the memory, on the host or on the device."""

    tokens_4T: Array
    decodes_2W: Array
    outputs_3W: Array
    plan_N8: Array


class RecordedInputs:
    """The memory of one shape, and its contents for a step that is all padding.

    padding_slot  in the KV cache
    """

    def __init__(self, shape: GraphShape, table: RequestTable, padding_slot: int) -> None:
        self.shape = shape
        self._padding = np.zeros(_length(shape), np.int32)
        views = _views(self._padding, shape)
        views.tokens_4T[0] = views.decodes_2W[0] = views.outputs_3W[1] = table.padding_row
        views.tokens_4T[2] = padding_slot
        self._device = table.to_device(self._padding.copy())
        on_device = _views(self._device, shape)
        self.tokens_4T: Tensor = on_device.tokens_4T
        self.decodes_2W: Tensor = on_device.decodes_2W if shape.has_prompts else self.tokens_4T[:2]
        self.outputs = Outputs(*on_device.outputs_3W) if shape.has_prompts else None
        self.plan_N8: Tensor = on_device.plan_N8

    def fill(
        self, inputs_4B: np.ndarray, layout: StepLayout, sampled: np.ndarray, plan_N8: np.ndarray
    ) -> None:
        """Write a step there. On a GPU nothing waits for that.

        inputs_4B  of `step_inputs`
        sampled    which of the step's requests get a token
        plan_N8    of the step's prompts, by the attention back end
        """
        filled = self._padding.copy()
        views = _views(filled, self.shape)
        num_tokens, num_decodes = layout.num_tokens, layout.num_decodes
        views.tokens_4T[:, :num_tokens] = inputs_4B[:, :num_tokens]
        if self.shape.has_prompts:
            views.decodes_2W[:, :num_decodes] = inputs_4B[:2, :num_decodes]
            views.outputs_3W[:, : len(sampled)] = layout.host_outputs(sampled)
            views.plan_N8[: len(plan_N8)] = plan_N8
        host = torch.from_numpy(filled)
        if self._device.device.type == "cuda":
            host = host.pin_memory()
        self._device.copy_(host, non_blocking=True)


def _parts(shape: GraphShape) -> list[tuple[int, int, int]]:
    """Rows of each view, numbers in a row, and how far apart the rows start."""
    T, W = shape.num_tokens, shape.num_outputs if shape.has_prompts else 0
    return [(4, T, padded_len(T)), (2, W, padded_len(W)), (3, W, padded_len(W)),
            (shape.num_plan_rows, 8, 8)]  # fmt: skip


def _length(shape: GraphShape) -> int:
    return sum(num * stride for num, _, stride in _parts(shape))


def _views(memory: Array, shape: GraphShape) -> _Views[Array]:
    views, begin = [], 0
    for num, length, stride in _parts(shape):
        end = begin + num * stride
        views.append(memory[begin:end].reshape(num, stride)[:, :length])
        begin = end
    return _Views(*views)
