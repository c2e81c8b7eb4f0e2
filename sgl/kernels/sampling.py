"""A token drawn from each row's logits, each row with its own parameters and random number.

The logits are divided by the temperature and made probabilities, tokens are ranked by logit (of
equal ones the lower id first), and kept are

    the k likeliest    those before whose turn at most mass p is spent    those with at least min_p
                                                                          times the best one's mass

each rule by the whole distribution. With the random number u, the token is the first at which the
running sum passes u times the total: of the kept ones by rank; of all by id where nothing limits
them. u is hashed from the row's seed and the position of the token that the logits follow, so a
row's tokens depend neither on its neighbours nor on when it runs.

Axes: B rows with logits    V vocabulary    R rows of the request table    C candidates, best first
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgl.kernels.sampling_table import MIN_P, TEMPERATURE, TOP_K, TOP_P, SamplingTable
from sgl.kernels.step_tokens import best_tokens_reference

NUM_CANDIDATES = 1024  # looked at first: sorting a whole vocabulary is slow


def sample_tokens(
    logits_BV: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    table: SamplingTable,
    last_token_R: Tensor,
) -> Tensor:
    """A token for each row, int64 [B], left in `last_token_R` too.

    Where the largest logit is not a finite number: -1, and 0 is left.

    rows_B       int32: row of the table
    positions_B  int32: of the token that the logits follow
    """
    assert rows_B.dtype == positions_B.dtype == torch.int32, f"{rows_B.dtype} {positions_B.dtype}"
    if logits_BV.device.type == "cuda":
        from sgl.kernels import triton_sampling

        return triton_sampling.sample_tokens(logits_BV, rows_B, positions_B, table, last_token_R)
    return sample_tokens_reference(logits_BV, rows_B, positions_B, table, last_token_R)


def sample_tokens_reference(
    logits_BV: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    table: SamplingTable,
    last_token_R: Tensor,
) -> Tensor:
    ids_B = best_tokens_reference(logits_BV, rows_B, last_token_R)
    numbers_BN = table.numbers_RN[rows_B]
    is_drawn_B = (numbers_BN[:, TOP_K] != 1) & (ids_B >= 0)
    if len(drawn := is_drawn_B.nonzero().squeeze(1)):
        uniform_B1 = uniform(table.seed_R[rows_B[drawn]], positions_B[drawn]).unsqueeze(1)
        ids_B[drawn] = _draw(logits_BV[drawn], uniform_B1, numbers_BN[drawn])
        last_token_R[rows_B] = ids_B.clamp(min=0)
    return ids_B


def uniform(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """Numbers in [0, 1), float64 [B], hashed from seed and position (splitmix64, Steele 2014)."""
    x = seed_B + (position_B.long() + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, num_bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _draw(logits_BV: Tensor, uniform_B1: Tensor, numbers_BN: Tensor) -> Tensor:
    """Rows with and without limits go separate ways, so that neighbours change nothing."""
    probs_BV = torch.softmax(logits_BV / numbers_BN[:, TEMPERATURE, None], dim=-1)
    is_limited_B = numbers_BN[:, TOP_K] < logits_BV.shape[1]
    is_limited_B |= (numbers_BN[:, TOP_P] < 1) | (numbers_BN[:, MIN_P] > 0)
    if is_limited_B.all():
        return _draw_kept(logits_BV, probs_BV, uniform_B1, numbers_BN)
    ids_B = _invert(probs_BV, uniform_B1)
    if len(some := is_limited_B.nonzero().squeeze(1)):
        inputs = (logits_BV, probs_BV, uniform_B1, numbers_BN)
        ids_B[some] = _draw_kept(*(value[some] for value in inputs))
    return ids_B


def _draw_kept(
    logits_BV: Tensor, probs_BV: Tensor, uniform_B1: Tensor, numbers_BN: Tensor
) -> Tensor:
    """Draw among the likeliest; rows where too few of them were looked at sort everything."""
    vocab_size = logits_BV.shape[1]
    num_candidates = min(NUM_CANDIDATES, vocab_size)
    ranked = _rank(logits_BV, num_candidates)
    ids_B, is_enough_B = _draw_ranked(*ranked, probs_BV, uniform_B1, numbers_BN)
    more = (~is_enough_B).nonzero().squeeze(1)
    if len(more) and num_candidates < vocab_size:
        ranked = _rank(logits_BV[more], vocab_size)
        inputs = (probs_BV, uniform_B1, numbers_BN)
        ids_B[more], _ = _draw_ranked(*ranked, *(value[more] for value in inputs))
    return ids_B


def _rank(logits_BV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The largest logits and their ids, best first; which of the last one's equals is open."""
    if num == logits_BV.shape[1]:
        values_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        return values_BV, ids_BV
    ids_BC = logits_BV.topk(num, dim=-1).indices.sort(dim=-1).values
    values_BC, order_BC = logits_BV.gather(1, ids_BC).sort(dim=-1, descending=True, stable=True)
    return values_BC, ids_BC.gather(1, order_BC)


def _draw_ranked(
    values_BC: Tensor, ids_BC: Tensor, probs_BV: Tensor, uniform_B1: Tensor, numbers_BN: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens [B] drawn from logits sorted best first; and whether these tell which are kept."""
    probs_BC = probs_BV.gather(1, ids_BC)
    top_p_B1 = numbers_BN[:, TOP_P, None]
    top_p_B1 = top_p_B1.where(top_p_B1 < 1, torch.inf)  # rounded sums may pass 1
    sums_BC = probs_BC.double().cumsum(dim=-1)
    ranks = torch.arange(probs_BC.shape[1], device=probs_BC.device)
    is_kept = (ranks < numbers_BN[:, TOP_K, None]) & (sums_BC - probs_BC <= top_p_B1)
    is_kept &= probs_BC >= numbers_BN[:, MIN_P, None] * probs_BC[:, :1]
    lowest_B = values_BC.where(is_kept, torch.inf).amin(dim=-1)
    index_B = _invert(probs_BC * is_kept, uniform_B1)
    return ids_BC.gather(1, index_B.unsqueeze(1)).squeeze(1), lowest_B > values_BC[:, -1]


def _invert(weights_BC: Tensor, uniform_B1: Tensor) -> Tensor:
    """Index of the first weight at which the running sum passes `uniform` times the total."""
    sums_BC = weights_BC.double().cumsum(dim=-1)
    index_B1 = torch.searchsorted(sums_BC, uniform_B1 * sums_BC[:, -1:], right=True)
    return index_B1.clamp(max=weights_BC.shape[-1] - 1).squeeze(1)
