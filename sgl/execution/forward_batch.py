"""One step as the model sees it: all tokens end to end, and where their KV goes.

Axes: T tokens of the step    B requests of the step    R rows of the request table
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sgl.execution.attention import AttentionBackend
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import StepLayout
from sgl.messages import StepPlan


class ForwardBatch:
    """The inputs of one forward pass; `attend` is the only door to the KV cache."""

    def __init__(
        self,
        plan: StepPlan,
        layout: StepLayout,
        table: RequestTable,
        attention: AttentionBackend,
    ) -> None:
        page_size = attention.cache.page_size
        positions = layout.positions()
        rows_T = np.repeat(layout.rows_B, layout.query_lens_B)
        pages_T = table.pages_RP[rows_T, positions // page_size].astype(np.int64)
        self.attention = attention
        self.token_ids_T = _token_ids(plan, layout, table)
        self.positions_T = table.to_device(positions)
        self.slots_T = table.to_device(pages_T * page_size + positions % page_size)
        attention.plan(layout, table)

    def attend(self, layer_id: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Store the keys and values of all T tokens, then attend over each request's own."""
        self.attention.cache.store(layer_id, self.slots_T, k_TKE, v_TKE)
        return self.attention.run(layer_id, q_THE)


def _token_ids(plan: StepPlan, layout: StepLayout, table: RequestTable) -> Tensor:
    """Decodes read the token the last step left in the table; chunks bring theirs."""
    parts = []
    if layout.num_decodes:
        decode_rows = table.to_device(layout.rows_B[: layout.num_decodes])
        parts.append(table.last_token_R[decode_rows])
    if plan.chunks:
        ids = b"".join(chunk.token_ids for chunk in plan.chunks)
        parts.append(table.to_device(np.frombuffer(ids, np.int32).astype(np.int64)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
