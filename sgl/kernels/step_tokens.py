"""Between two steps on the device: which tokens go in, which token comes out of each row's logits.

The first kernel of a step reads what the last one of the step before has written, so tokens go
round without the host.

Axes: T tokens of the step    B rows with logits    V vocabulary
      R, P rows and columns of the page table
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgl.kernels.collectives import TensorParallel

ALONE = TensorParallel()


def take_tokens(
    inputs_4T: Tensor, last_token_R: Tensor, pages_RP: Tensor, page_size: int
) -> Tensor:
    """The step's token ids, int64 [T]; notes in the page table where each token's KV goes.

    inputs_4T  int32: row of each token, its position, its slot, and its id, or -1 where that is
               the row's last token
    """
    assert inputs_4T.dtype == torch.int32, f"the inputs are {inputs_4T.dtype}"
    if inputs_4T.device.type == "cuda":
        from sgl.kernels import triton_step_tokens

        return triton_step_tokens.take_tokens(inputs_4T, last_token_R, pages_RP, page_size)
    return take_tokens_reference(inputs_4T, last_token_R, pages_RP, page_size)


def best_tokens(
    logits_BV: Tensor, rows_B: Tensor, last_token_R: Tensor, tp: TensorParallel = ALONE
) -> Tensor:
    """The likeliest token of each row, int64 [B], left in `last_token_R` too.

    Of equal ones the first. Where the largest logit is not a finite number: -1, and 0 is left.
    Every rank of `tp` has the logits of as many ids, in the order of the ranks.
    """
    if logits_BV.device.type == "cuda":
        from sgl.kernels import triton_step_tokens

        return triton_step_tokens.best_tokens(logits_BV, rows_B, last_token_R, tp)
    return best_tokens_reference(logits_BV, rows_B, last_token_R, tp)


def take_tokens_reference(
    inputs_4T: Tensor, last_token_R: Tensor, pages_RP: Tensor, page_size: int
) -> Tensor:
    rows_T, positions_T, slots_T, ids_T = inputs_4T.long()
    pages_RP[rows_T, positions_T // page_size] = (slots_T // page_size).int()
    return torch.where(ids_T < 0, last_token_R[rows_T], ids_T)


def best_tokens_reference(
    logits_BV: Tensor, rows_B: Tensor, last_token_R: Tensor, tp: TensorParallel = ALONE
) -> Tensor:
    best_B, ids_B = logits_BV.max(dim=-1)
    if tp.size > 1:
        ids_BN = tp.all_gather_last(ids_B.unsqueeze(1) + tp.rank * logits_BV.shape[1])
        best_B, ranks_B = tp.all_gather_last(best_B.unsqueeze(1)).max(dim=-1)
        ids_B = ids_BN.gather(1, ranks_B.unsqueeze(1)).squeeze(1)
    ids_B = ids_B.where(best_B.isfinite(), -1)
    last_token_R[rows_B] = ids_B.clamp(min=0)
    return ids_B
