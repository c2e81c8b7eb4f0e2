"""Penalties: logits of tokens that a request has already had are changed before it samples.

    in prompt or output    divided by the repetition penalty if positive, else multiplied
    in output              less the frequency penalty for each time, less the presence penalty once

Axes: B rows with logits    V vocabulary    R rows of the request table
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgl.kernels.sampling_table import FREQUENCY, GREEDY, PRESENCE, REPETITION, SamplingTable


def apply_penalties(
    logits_BV: Tensor,
    rows_B: Tensor,
    table: SamplingTable,
    output_counts_RV: Tensor,
    is_in_prompt_RV: Tensor,
) -> None:
    """Change logits in place. Rows without a penalty need not have counts.

    rows_B            int32: row of the table
    output_counts_RV  int32: how often a token is in the output
    is_in_prompt_RV   bool
    """
    assert rows_B.dtype == torch.int32, f"the rows are {rows_B.dtype}"
    if logits_BV.device.type == "cuda":
        from sgl.kernels import triton_penalties

        triton_penalties.apply_penalties(
            logits_BV, rows_B, table, output_counts_RV, is_in_prompt_RV
        )
    else:
        apply_penalties_reference(logits_BV, rows_B, table, output_counts_RV, is_in_prompt_RV)


def count_tokens(
    token_ids_B: Tensor, rows_B: Tensor, table: SamplingTable, output_counts_RV: Tensor
) -> None:
    """Count a new token of each row with a penalty; -1, which is none, counts as token 0."""
    assert rows_B.dtype == torch.int32, f"the rows are {rows_B.dtype}"
    if token_ids_B.device.type == "cuda":
        from sgl.kernels import triton_penalties

        triton_penalties.count_tokens(token_ids_B, rows_B, table, output_counts_RV)
    else:
        count_tokens_reference(token_ids_B, rows_B, table, output_counts_RV)


def apply_penalties_reference(
    logits_BV: Tensor,
    rows_B: Tensor,
    table: SamplingTable,
    output_counts_RV: Tensor,
    is_in_prompt_RV: Tensor,
) -> None:
    where, rows = _penalised(rows_B, table)
    numbers_BN = table.numbers_RN[rows]
    logits, counts = logits_BV[where], output_counts_RV[rows]
    repetition_B1 = numbers_BN[:, REPETITION, None]
    scaled = torch.where(logits > 0, logits / repetition_B1, logits * repetition_B1)
    logits = torch.where((counts > 0) | is_in_prompt_RV[rows], scaled, logits)
    logits -= numbers_BN[:, FREQUENCY, None] * counts
    logits -= numbers_BN[:, PRESENCE, None] * (counts > 0)
    logits_BV[where] = logits


def count_tokens_reference(
    token_ids_B: Tensor, rows_B: Tensor, table: SamplingTable, output_counts_RV: Tensor
) -> None:
    where, rows = _penalised(rows_B, table)
    output_counts_RV[rows, token_ids_B[where].clamp(min=0)] += 1


def _penalised(rows_B: Tensor, table: SamplingTable) -> tuple[Tensor, Tensor]:
    """Which of the B have a penalty, and their rows."""
    penalties = [FREQUENCY, PRESENCE, REPETITION]
    neutral = torch.tensor([GREEDY[column] for column in penalties], device=rows_B.device)
    is_penalised_B = (table.numbers_RN[rows_B][:, penalties] != neutral).any(dim=1)
    where = is_penalised_B.nonzero().squeeze(1)
    return where, rows_B[where]
