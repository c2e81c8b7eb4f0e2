"""From logits to tokens, for all rows of a step at once, each with its own parameters.

Order: penalties, minimum length, logit bias, then temperature, top-k and top-p (both of the
tempered distribution), min-p, draw. A row draws with one number hashed from its seed and how many
tokens it has, so its output depends neither on its neighbours nor on when it runs.

Axes: B sampled rows    V vocabulary    R rows of the request table    C candidates, best first
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sgl.execution.request_table import RequestTable
from sgl.kernels.step_tokens import best_tokens

NUM_CANDIDATES = 1024  # top-p is first tried on so many: sorting a whole vocabulary is slow


class Sampler:
    """Reads parameters from the request table and leaves the sampled tokens there."""

    def __init__(self, table: RequestTable) -> None:
        self.table = table

    def sample(self, logits_BV: Tensor, rows_B: np.ndarray) -> Tensor:
        """Token ids, int64 [B]; -1 where a row's logits are not numbers. Changes the logits."""
        table = self.table
        device_rows_B = table.to_device(rows_B)
        self._edit(logits_BV, rows_B)
        ids_B = best_tokens(logits_BV, device_rows_B, table.last_token_R)
        is_drawn = ~table.is_greedy_R[rows_B]
        if is_drawn.any():
            drawn = np.flatnonzero(is_drawn)
            where = table.to_device(drawn)
            drawn_ids = self._draw(logits_BV[where], rows_B[drawn])
            ids_B[where] = drawn_ids.where(ids_B[where] >= 0, -1)
            self._leave(ids_B, device_rows_B)
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
        device_rows_B = self.table.to_device(rows_B)
        self._leave(ids_B, device_rows_B)
        self._remember(ids_B, rows_B, device_rows_B)

    def count(self, rows_B: np.ndarray) -> None:
        """Plain rows got a token each, which is in the table already."""
        self.table.num_output_R[rows_B] += 1

    def _leave(self, ids_B: Tensor, device_rows_B: Tensor) -> None:
        self.table.last_token_R[device_rows_B] = ids_B.clamp(min=0)

    def _remember(self, ids_B: Tensor, rows_B: np.ndarray, device_rows_B: Tensor) -> None:
        table = self.table
        table.num_output_R[rows_B] += 1
        if table.output_counts_RV is not None and table.has_penalty_R[rows_B].any():
            tokens_B = ids_B.clamp(min=0)
            ones = torch.ones_like(tokens_B, dtype=torch.int32)
            table.output_counts_RV.index_put_((device_rows_B, tokens_B), ones, accumulate=True)

    def _edit(self, logits_BV: Tensor, rows_B: np.ndarray) -> None:
        """Everything that changes the logits before the temperature, in place."""
        table = self.table
        if (penalised := np.flatnonzero(table.has_penalty_R[rows_B])).size:
            self._penalise(logits_BV, penalised, rows_B[penalised])
        too_short = table.num_output_R[rows_B] < table.min_output_R[rows_B]
        for index in np.flatnonzero(too_short):
            logits_BV[index].index_fill_(0, table.eos_ids[rows_B[index]], float("-inf"))
        for index in np.flatnonzero(table.has_bias_R[rows_B]):
            if bias := table.biases[rows_B[index]]:
                logits_BV[index].index_add_(0, *bias)

    def _penalise(self, logits_BV: Tensor, where: np.ndarray, rows: np.ndarray) -> None:
        table = self.table
        assert table.output_counts_RV is not None
        assert table.is_in_prompt_RV is not None
        here, device_rows = table.to_device(where), table.to_device(rows)
        logits = logits_BV[here]
        counts = table.output_counts_RV[device_rows]
        is_present = counts > 0
        repetition = table.number("repetition_penalty", device_rows)
        is_repeated = is_present | table.is_in_prompt_RV[device_rows]
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(is_repeated, scaled, logits)
        logits -= table.number("frequency_penalty", device_rows) * counts
        logits -= table.number("presence_penalty", device_rows) * is_present
        logits_BV[here] = logits

    def _draw(self, logits_BV: Tensor, rows_B: np.ndarray) -> Tensor:
        """Rows with and without filters go separate ways, so that neighbours change nothing."""
        table = self.table
        rows = table.to_device(rows_B)
        num_output_B = table.to_device(table.num_output_R[rows_B])
        uniform_B1 = uniform(table.seed_R[rows], num_output_B).unsqueeze(1)
        probs_BV = torch.softmax(logits_BV / table.number("temperature", rows), dim=-1)
        has_filter_B = table.has_filter_R[rows_B]
        if not has_filter_B.any():
            return _invert(probs_BV, uniform_B1)
        limits = [table.number(name, rows) for name in ("top_k", "top_p", "min_p")]
        if has_filter_B.all():
            return _draw_filtered(probs_BV, uniform_B1, *limits)
        ids_B = _invert(probs_BV, uniform_B1)
        some = table.to_device(np.flatnonzero(has_filter_B))
        inputs = (probs_BV, uniform_B1, *limits)
        ids_B[some] = _draw_filtered(*(value[some] for value in inputs))
        return ids_B


def uniform(seed_B: Tensor, counter_B: Tensor) -> Tensor:
    """Numbers in [0, 1), float64 [B], hashed from seed and counter (splitmix64, Steele 2014)."""
    x = seed_B + (counter_B + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, num_bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _draw_filtered(
    probs_BV: Tensor, uniform_B1: Tensor, top_k_B1: Tensor, top_p_B1: Tensor, min_p_B1: Tensor
) -> Tensor:
    """Draw among the likeliest; rows where too few of them were looked at sort everything."""
    limits = (top_k_B1, top_p_B1, min_p_B1)
    num_candidates = min(NUM_CANDIDATES, probs_BV.shape[-1])
    if probs_BV.device.type != "cpu" or num_candidates == probs_BV.shape[-1]:
        return _draw_sorted(probs_BV.sort(dim=-1, descending=True, stable=True), uniform_B1, limits)
    top = probs_BV.topk(num_candidates, dim=-1)
    ids_B = _draw_sorted(top, uniform_B1, limits)
    is_enough = top_k_B1 <= num_candidates
    is_enough |= top.values.sum(dim=-1, keepdim=True) > top_p_B1
    is_enough |= top.values[:, -1:] < min_p_B1 * top.values[:, :1]
    if len(more := (~is_enough.squeeze(1)).nonzero().squeeze(1)):
        ranked = probs_BV[more].sort(dim=-1, descending=True, stable=True)
        picked = tuple(limit[more] for limit in limits)
        ids_B[more] = _draw_sorted(ranked, uniform_B1[more], picked)
    return ids_B


def _draw_sorted(
    ranked: tuple[Tensor, Tensor], uniform_B1: Tensor, limits: tuple[Tensor, ...]
) -> Tensor:
    """Draw from probabilities sorted best first, and their ids; both [B, C].

    Kept are: the k likeliest; those before whose turn at most mass p is spent; those with at
    least min_p times the best one's probability.
    """
    probs_BC, ids_BC = ranked
    top_k_B1, top_p_B1, min_p_B1 = limits
    ranks = torch.arange(probs_BC.shape[-1], device=probs_BC.device)
    spent_BC = probs_BC.cumsum(dim=-1) - probs_BC
    is_kept = (ranks < top_k_B1) & (spent_BC <= top_p_B1)
    is_kept &= probs_BC >= min_p_B1 * probs_BC[:, :1]
    index_B = _invert(probs_BC * is_kept, uniform_B1)
    return ids_BC.gather(1, index_B.unsqueeze(1)).squeeze(1)


def _invert(weights_BC: Tensor, uniform_B1: Tensor) -> Tensor:
    """Index of the first weight at which the running sum passes `uniform` times the total."""
    sums_BC = weights_BC.double().cumsum(dim=-1)
    index_B1 = torch.searchsorted(sums_BC, uniform_B1 * sums_BC[:, -1:], right=True)
    return index_B1.clamp(max=weights_BC.shape[-1] - 1).squeeze(1)
