"""Log-probabilities under the model's raw distribution: before penalties, bias and temperature.

Axes: K tokens    V vocabulary    D hidden
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sgl.messages import LogprobOptions, Logprobs

ROWS_AT_ONCE = 128  # of a prompt: a [prompt, vocabulary] table would not fit


def of_tokens(logits_KV: Tensor, ids_K: Tensor, options: LogprobOptions) -> Logprobs:
    """Log-probabilities of `ids_K`, and of the alternatives asked for, one token per row."""
    logprobs_KV = torch.log_softmax(logits_KV.float(), dim=-1)
    values = logprobs_KV.gather(1, ids_K.clamp(min=0).unsqueeze(1)).squeeze(1)
    top_values, top_ids = logprobs_KV.topk(min(options.top_num, logits_KV.shape[-1]), dim=-1)
    chosen = torch.from_numpy(np.frombuffer(options.token_ids, np.int32).astype(np.int64))
    return Logprobs(
        values=_bytes(values),
        top_values=_bytes(top_values),
        top_ids=_bytes(top_ids.int()),
        chosen_values=_bytes(logprobs_KV[:, chosen.to(logits_KV.device)]),
    )


def of_prompt(
    hidden_KD: Tensor,
    next_ids_K: Tensor,
    options: LogprobOptions,
    logits: Callable[[Tensor], Tensor],
) -> Logprobs:
    """Log-probabilities of prompt tokens from the hidden states before them, a few at a time."""
    parts = [
        of_tokens(logits(hidden_KD[begin : begin + ROWS_AT_ONCE]), ids_k, options)
        for begin in range(0, len(hidden_KD), ROWS_AT_ONCE)
        if len(ids_k := next_ids_K[begin : begin + ROWS_AT_ONCE])
    ]
    return Logprobs(
        values=b"".join(part.values for part in parts),
        top_values=b"".join(part.top_values for part in parts),
        top_ids=b"".join(part.top_ids for part in parts),
        chosen_values=b"".join(part.chosen_values for part in parts),
    )


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().cpu().numpy().tobytes())
