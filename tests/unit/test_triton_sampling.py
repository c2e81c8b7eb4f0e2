"""Sampling and penalties in Triton against their torch references, token for token."""

from __future__ import annotations

import math
import os

import pytest
import torch

from sgl.kernels import triton_penalties, triton_sampling
from sgl.kernels.penalties import apply_penalties_reference, count_tokens_reference
from sgl.kernels.sampling import sample_tokens_reference
from sgl.kernels.sampling_table import MIN_P, NUMBERS, SamplingTable

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
NO_LIMIT = 2**20
GREEDY = (1.0, 1, 1.0, 0.0)
ANY = (0.7, NO_LIMIT, 1.0, 0.0)
# temperature, top-k, top-p, min-p
NUMBERS_OF_ROWS = [
    GREEDY,
    ANY,
    (1.0, 5, 1.0, 0.0),
    (1.3, 3000, 1.0, 0.0),
    (1.0, NO_LIMIT, 0.9, 0.0),
    (2.0, NO_LIMIT, 0.99, 0.0),
    (1.5, NO_LIMIT, 1.0, 0.1),
    (1.3, 40, 0.8, 0.01),
    (0.3, 50, 0.95, 0.0),
]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table_of(numbers: list[tuple[float, ...]], vocab_size: int, first_seed: int) -> SamplingTable:
    """Row r + 1 has the r-th numbers; rows 0 and the last are greedy."""
    table = SamplingTable.greedy(len(numbers) + 2, DEVICE)
    for row, (temperature, top_k, *rest) in enumerate(numbers, start=1):
        values = torch.tensor([temperature, min(top_k, vocab_size), *rest])
        table.numbers_RN[row, : MIN_P + 1] = values
        table.seed_R[row] = first_seed * 1000 + row
    return table


def sample(logits_BV, numbers, *, seed=0, order=None, is_reference=False):
    """Tokens, and the last tokens of the table; in another `order` of rows if wished."""
    logits_BV, B = logits_BV.to(DEVICE), len(logits_BV)
    table = table_of(numbers, logits_BV.shape[1], seed)
    last_token_R = torch.full((B + 2,), 77, device=DEVICE)
    order = torch.arange(B, device=DEVICE) if order is None else order.to(DEVICE)
    function = sample_tokens_reference if is_reference else triton_sampling.sample_tokens
    rows_B, positions_B = (order + 1).int(), (order * 3).int()
    ids_B = function(logits_BV[order].contiguous(), rows_B, positions_B, table, last_token_R)
    assert last_token_R[0] == last_token_R[-1] == 77
    return ids_B.tolist(), last_token_R[1:-1].tolist()


def assert_as_reference(logits_BV, numbers, *, seed=0) -> list[int]:
    got = sample(logits_BV, numbers, seed=seed)
    assert got == sample(logits_BV, numbers, seed=seed, is_reference=True)
    return got[0]


@pytest.fixture
def small_lists(monkeypatch):
    """Lists that overflow with few tokens."""
    monkeypatch.setattr(triton_sampling, "CHUNK", 32)
    monkeypatch.setattr(triton_sampling, "MAX_LISTED", 128)


@pytest.mark.parametrize(
    ("vocab_size", "spread"), [(7, 4.0), (300, 4.0), (2048, 4.0), (5000, 4.0), (2049, 0.1)]
)
def test_every_row_gets_the_token_of_the_reference(vocab_size, spread):
    logits_BV = noise(len(NUMBERS_OF_ROWS), vocab_size) * spread
    ids = assert_as_reference(logits_BV, NUMBERS_OF_ROWS)
    assert ids[0] == int(logits_BV[0].argmax())


def test_a_vocabulary_of_real_size():
    numbers = [ANY, (0.7, 50, 0.9, 0.0), (1.0, NO_LIMIT, 0.95, 0.02)]
    assert_as_reference(noise(3, 49152) * 4, numbers)


@pytest.mark.parametrize("row", range(1, len(NUMBERS_OF_ROWS)))
def test_each_limit_alone_with_many_seeds(row):
    numbers = [NUMBERS_OF_ROWS[row]] * 6
    ids = assert_as_reference(noise(1, 200).repeat(6, 1), numbers, seed=row)
    assert len(set(ids)) > 1


@pytest.mark.parametrize("spread", [3.0, 0.01], ids=["peaked", "flat"])
def test_rows_with_more_candidates_than_a_list_holds(small_lists, spread):
    assert_as_reference(noise(len(NUMBERS_OF_ROWS), 300) * spread, NUMBERS_OF_ROWS)


def test_a_distribution_so_flat_that_the_real_list_overflows():
    numbers = [(1.0, NO_LIMIT, 0.95, 0.0), (1.0, 8700, 0.99, 0.0)]
    logits_BV = noise(2, 9000) * 0.01
    logits_BV[0] = 0.0
    ids = assert_as_reference(logits_BV, numbers)
    assert 0 <= ids[0] < 0.951 * 9000


@pytest.mark.parametrize("seed", range(2))
def test_of_equal_logits_the_first_are_kept(small_lists, seed):
    logits_BV = (noise(4, 600, seed=seed) * 2).round()
    logits_BV[1] = logits_BV[1].clamp(max=1.0)
    logits_BV[2, ::2] = -0.0
    numbers = [(1.0, 5, 1.0, 0.0), (1.0, 9, 1.0, 0.0), (0.5, 7, 0.9, 0.0), (2.0, 60, 1.0, 0.1)]
    ids = assert_as_reference(logits_BV, numbers, seed=seed)
    first_five = logits_BV[0].sort(descending=True, stable=True).indices[:5]
    assert ids[0] in first_five.tolist()
    assert ids[1] in (logits_BV[1] == 1.0).nonzero()[:9, 0].tolist()


def test_masked_tokens_are_never_drawn():
    logits_BV = torch.full((len(NUMBERS_OF_ROWS), 4500), -math.inf)
    allowed = torch.tensor([2050, 2051, 4499])  # none in the first part
    logits_BV[:, allowed] = noise(len(NUMBERS_OF_ROWS), 3)
    ids = assert_as_reference(logits_BV, NUMBERS_OF_ROWS)
    assert set(ids) == set(allowed.tolist())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_numbers_get_none_and_harm_no_other(value):
    logits_BV = noise(6, 2500)
    logits_BV[::2, 2400] = value
    if value == -math.inf:
        logits_BV[::2] = value
    numbers = [GREEDY, GREEDY, ANY, ANY, (1.0, 9, 0.9, 0.0), (1.0, 9, 0.9, 0.0)]
    ids, last = sample(logits_BV, numbers)
    wanted, _ = sample(logits_BV[1::2], numbers[1::2], is_reference=True)
    assert ids[::2] == [-1, -1, -1]
    assert last == [max(token, 0) for token in ids]
    assert ids[1] == wanted[0]
    assert min(ids[1::2]) >= 0


def test_extreme_parameters():
    numbers = [
        (1e-6, NO_LIMIT, 1.0, 0.0),
        (1e-6, NO_LIMIT, 0.9, 0.0),
        (1e6, NO_LIMIT, 1.0, 0.0),
        (1e6, 700, 0.5, 0.5),
        (1.0, NO_LIMIT, 1e-6, 0.0),
        (1.0, NO_LIMIT, 1.0, 1.0),
        (1.0, NO_LIMIT, 1 - 2**-24, 0.0),
        (0.02, 50, 1.0, 0.0),
    ]
    logits_BV = noise(len(numbers), 900) * 6 - 200.0
    ids = assert_as_reference(logits_BV, numbers)
    best = logits_BV.argmax(dim=1).tolist()
    assert [ids[row] for row in (0, 1, 4, 5)] == [best[row] for row in (0, 1, 4, 5)]


def test_neither_neighbours_nor_their_order_change_a_row():
    logits_BV = noise(len(NUMBERS_OF_ROWS), 2300) * 2
    ids, _ = sample(logits_BV, NUMBERS_OF_ROWS)
    order = torch.tensor([4, 8, 1, 0, 7, 5, 2, 6, 3])
    others, _ = sample(logits_BV, NUMBERS_OF_ROWS, order=order)
    assert [ids[row] for row in order] == others
    for row in (1, 4):
        alone, _ = sample(logits_BV, NUMBERS_OF_ROWS, order=torch.tensor([row]))
        assert alone == [ids[row]]


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [
        ((1.0, NO_LIMIT, 1.0, 0.0), [0.4, 0.3, 0.2, 0.1]),
        ((0.5, 3, 0.99, 0.0), [16 / 29, 9 / 29, 4 / 29, 0.0]),
    ],
    ids=["all", "limited"],
)
def test_draws_follow_the_distribution(numbers, wanted):
    num = 48
    logits_BV = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(num, 1)
    ids, _ = sample(logits_BV, [numbers] * num, seed=1)
    found = torch.bincount(torch.tensor(ids), minlength=4)
    expected = torch.tensor(wanted) * num
    assert found[expected == 0].sum() == 0
    is_possible = expected > 0
    chi_square = ((found - expected)[is_possible] ** 2 / expected[is_possible]).sum()
    assert chi_square < 12.0  # one in 100 with 3 degrees of freedom: 11.3


def test_no_rows():
    assert sample(torch.zeros(0, 10), []) == ([], [])


def penalised_table() -> SamplingTable:
    """Four rows: frequency, presence, repetition, all; the fifth has none."""
    table = SamplingTable.greedy(5, DEVICE)
    first = NUMBERS.index("frequency_penalty")
    penalties = [[0.5, 0.0, 1.0], [0.0, -0.25, 1.0], [0.0, 0.0, 1.5], [-0.5, 0.25, 0.8]]
    table.numbers_RN[:4, first : first + 3] = torch.tensor(penalties)
    return table


@pytest.mark.parametrize("vocab_size", [5, 4500])
def test_penalties(vocab_size):
    generator = torch.Generator().manual_seed(0)
    counts_RV = torch.randint(0, 3, (4, vocab_size), generator=generator).int().to(DEVICE)
    is_in_prompt_RV = (torch.rand(4, vocab_size, generator=generator) < 0.3).to(DEVICE)
    rows_B = torch.tensor([3, 4, 0, 2, 1, 4], dtype=torch.int32, device=DEVICE)
    logits = [noise(6, vocab_size).to(DEVICE) for _ in range(2)]
    logits[0][0, 1] = logits[1][0, 1] = -math.inf
    before_BV = logits[0].clone()
    inputs = (rows_B, penalised_table(), counts_RV, is_in_prompt_RV)
    triton_penalties.apply_penalties(logits[0], *inputs)
    apply_penalties_reference(logits[1], *inputs)
    torch.testing.assert_close(*logits)
    assert torch.equal(logits[0][[1, 5]], before_BV[[1, 5]])
    is_free = (counts_RV[0] == 0) & ~is_in_prompt_RV[0]
    assert torch.equal(logits[0][2, is_free], before_BV[2, is_free])
    assert not torch.equal(logits[0][2], before_BV[2])


def test_only_tokens_of_penalised_rows_are_counted():
    counts = [torch.ones(4, 9, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    rows_B = torch.tensor([2, 4, 0, 4, 3], dtype=torch.int32, device=DEVICE)
    ids_B = torch.tensor([8, 5, 3, 5, -1], device=DEVICE)
    triton_penalties.count_tokens(ids_B, rows_B, penalised_table(), counts[0])
    count_tokens_reference(ids_B, rows_B, penalised_table(), counts[1])
    assert torch.equal(*counts)
    assert (counts[0] - 1).nonzero().tolist() == [[0, 3], [2, 8], [3, 0]]
    assert counts[0].sum() == 4 * 9 + 3
