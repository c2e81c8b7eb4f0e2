"""One step as the model sees it: all tokens end to end, and where their KV goes.

    host     chunks, layout ──▶ step_inputs ── one copy ──▶ inputs_4T
    device   inputs_4T, last tokens of the rows ──▶ token ids, positions, slots ──▶ model

Axes: T tokens of the step    N = H + 2K heads    E head size
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sgl.execution.attention import AttentionBackend
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import Outputs, StepLayout, padded_len
from sgl.kernels.rotary import rotate_and_store
from sgl.kernels.step_tokens import take_tokens
from sgl.messages import Chunk
from sgl.models.batch import Angles


def step_inputs(
    chunks: Sequence[Chunk], layout: StepLayout, table: RequestTable, page_size: int
) -> np.ndarray:
    """Row, position, slot and id of every token, int32 [4, `padded_len(T)`].

    Decodes have the id -1: theirs is the token that the last step left in the table.
    """
    positions_T = layout.positions()
    num_tokens = len(positions_T)
    inputs_4T = np.zeros((4, padded_len(num_tokens)), np.int32)
    rows_T = np.repeat(layout.rows_B, layout.query_lens_B)
    pages_T = table.pages_RP[rows_T, positions_T // page_size]
    inputs_4T[0, :num_tokens] = rows_T
    inputs_4T[1, :num_tokens] = positions_T
    inputs_4T[2, :num_tokens] = pages_T * page_size + positions_T % page_size
    inputs_4T[3, : layout.num_decodes] = -1
    ids = b"".join(chunk.token_ids for chunk in chunks)
    inputs_4T[3, layout.num_decodes : num_tokens] = np.frombuffer(ids, np.int32)
    return inputs_4T


class ForwardBatch:
    """The inputs of one forward pass; `attend` is the only door to the KV cache.

    To be made first: it notes new pages on the device, which `attention.plan` may read there.

    outputs  tokens whose output is wanted, None: all. The last layer stores the KV of the others
             and computes nothing more for them.
    """

    def __init__(
        self,
        inputs_4T: Tensor,
        table: RequestTable,
        attention: AttentionBackend,
        outputs: Outputs | None = None,
    ) -> None:
        cache = attention.cache
        self.attention = attention
        self.outputs = outputs
        self.last_layer = len(cache.keys_SKE) - 1
        self.token_ids_T = take_tokens(
            inputs_4T, table.last_token_R, table.device_pages_RP, cache.page_size
        )
        self.positions_T = inputs_4T[1]
        self.slots_T = inputs_4T[2] if inputs_4T.device.type == "cuda" else inputs_4T[2].long()

    def attend(self, layer_id: int, qkv_TNE: Tensor, angles: Angles) -> Tensor:
        """Store the keys and values of all T tokens, then attend over each request's own."""
        cache = self.attention.cache
        q_THE = rotate_and_store(
            qkv_TNE, *angles, cache.keys_SKE[layer_id], cache.values_SKE[layer_id], self.slots_T
        )
        if self.outputs is not None and layer_id == self.last_layer:
            return self.attention.run_outputs(layer_id, q_THE, self.outputs)
        return self.attention.run(layer_id, q_THE)

    def kept(self, layer_id: int, x_TD: Tensor) -> Tensor:
        """The rows of `x_TD` that are left after the attention of this layer."""
        if self.outputs is not None and layer_id == self.last_layer:
            return x_TD.index_select(0, self.outputs.tokens_W)
        return x_TD
