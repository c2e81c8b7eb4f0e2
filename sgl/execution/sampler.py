"""From logits to tokens, for all rows of a step at once, each with its own parameters.

Order: a grammar's mask (applied in runner.py), penalties, minimum length, logit bias, then
temperature, top-k and top-p (both of the tempered distribution), min-p, draw (kernels/sampling.py).
A row draws with one number hashed from its seed and its length, so its output depends neither on
its neighbours nor on when it runs.

Axes: B sampled rows    V vocabulary    R rows of the request table
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sgl.execution.request_table import RequestTable
from sgl.kernels.penalties import apply_penalties, count_tokens
from sgl.kernels.sampling import sample_tokens
from sgl.kernels.step_tokens import best_tokens


class Sampler:
    """Reads parameters from the request table and leaves the sampled tokens there."""

    def __init__(self, table: RequestTable) -> None:
        self.table = table

    def warm_up(self, logits_BV: Tensor, rows_B: Tensor, positions_B: Tensor) -> None:
        """Compile every kernel that a sampled token may need; the rows are nobody's."""
        table = self.table
        counts_1V = torch.zeros(1, table.vocab_size, dtype=torch.int32, device=table.device)
        apply_penalties(logits_BV, rows_B, table.sampling, counts_1V, counts_1V.bool())
        best_tokens(logits_BV, rows_B, table.last_token_R)
        ids_B = sample_tokens(logits_BV, rows_B, positions_B, table.sampling, table.last_token_R)
        count_tokens(ids_B, rows_B, table.sampling, counts_1V)

    def sample(self, logits_BV: Tensor, rows_B: np.ndarray, positions_B: np.ndarray) -> Tensor:
        """Token ids, int64 [B]; -1 where a row's logits are not numbers. Changes the logits.

        positions_B  of the tokens that the logits follow
        """
        table = self.table
        device_rows_B = table.to_device(rows_B.astype(np.int32))
        self._edit(logits_BV, rows_B, device_rows_B)
        if table.is_greedy_R[rows_B].all():
            ids_B = best_tokens(logits_BV, device_rows_B, table.last_token_R)
        else:
            where_B = table.to_device(positions_B.astype(np.int32))
            last_token_R = table.last_token_R
            ids_B = sample_tokens(logits_BV, device_rows_B, where_B, table.sampling, last_token_R)
        self._remember(ids_B, rows_B, device_rows_B)
        return ids_B

    def is_plain(self, rows_B: np.ndarray) -> bool:
        """Whether `sample` would do no more than take the best token of each row."""
        table = self.table
        return not (
            (~table.is_greedy_R[rows_B]).any()
            or table.has_penalty_R[rows_B].any()
            or table.has_bias_R[rows_B].any()
            or (table.num_output_R[rows_B] < table.min_output_R[rows_B]).any()
        )

    def take(self, ids_B: Tensor, rows_B: np.ndarray) -> None:
        """Leave tokens that another rank sampled in the table."""
        device_rows_B = self.table.to_device(rows_B.astype(np.int32))
        self.table.last_token_R[device_rows_B] = ids_B.clamp(min=0)
        self._remember(ids_B, rows_B, device_rows_B)

    def count(self, rows_B: np.ndarray) -> None:
        """Plain rows got a token each, which is in the table already."""
        self.table.num_output_R[rows_B] += 1

    def _remember(self, ids_B: Tensor, rows_B: np.ndarray, device_rows_B: Tensor) -> None:
        table = self.table
        table.num_output_R[rows_B] += 1
        if table.output_counts_RV is not None and table.has_penalty_R[rows_B].any():
            count_tokens(ids_B, device_rows_B, table.sampling, table.output_counts_RV)

    def _edit(self, logits_BV: Tensor, rows_B: np.ndarray, device_rows_B: Tensor) -> None:
        """Everything that changes the logits before the temperature, in place."""
        table = self.table
        if table.has_penalty_R[rows_B].any():
            counts_RV, is_in_prompt_RV = table.output_counts_RV, table.is_in_prompt_RV
            assert counts_RV is not None
            assert is_in_prompt_RV is not None
            apply_penalties(logits_BV, device_rows_B, table.sampling, counts_RV, is_in_prompt_RV)
        too_short = table.num_output_R[rows_B] < table.min_output_R[rows_B]
        for index in np.flatnonzero(too_short):
            logits_BV[index].index_fill_(0, table.eos_ids[rows_B[index]], float("-inf"))
        for index in np.flatnonzero(table.has_bias_R[rows_B]):
            if bias := table.biases[rows_B[index]]:
                logits_BV[index].index_add_(0, *bias)
