"""The sampler against the definition of each parameter, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sgl.execution.request_table import RequestTable
from sgl.execution.sampler import Sampler
from sgl.kernels.sampling import uniform
from sgl.messages import NewRow, StepPlan, pack
from sgl.sampling_params import SamplingParams

V = 40
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(*sampling, device="cpu", vocab=V, **row_fields):
    """A table with one row for each sampling, and a sampler on it."""
    table = RequestTable(max(8, len(sampling)), 4, vocab, torch.device(device))
    rows = [
        NewRow(row, 0, b"", params, seed=100 + row, **row_fields)
        for row, params in enumerate(sampling)
    ]
    table.apply(StepPlan(0, admitted=rows))
    return table, Sampler(table), np.arange(len(sampling))


def sample(sampler, logits, rows):
    """As after prompts of one token: the n-th output token follows the one at position n."""
    return sampler.sample(logits, rows, sampler.table.num_output_R[rows])


def params(**fields):
    return SamplingParams(**({"temperature": 0.0} | fields))


def draws(sampling, logits):
    """How often each token is drawn."""
    _, sampler, rows = make(*[sampling] * 500, vocab=len(logits))
    ids = torch.cat([sample(sampler, logits.repeat(500, 1), rows) for _ in range(8)])
    return torch.bincount(ids, minlength=len(logits)) / len(ids)


@pytest.mark.parametrize("device", DEVICES)
def test_temperature_zero_takes_the_likeliest(device):
    table, sampler, rows = make(params(), params(top_k=1, temperature=2.0), device=device)
    logits = torch.randn(2, V, device=device)
    ids = sample(sampler, logits.clone(), rows)
    assert ids.tolist() == logits.argmax(-1).tolist()
    assert table.last_token_R[:2].tolist() == ids.tolist()
    assert table.num_output_R[:2].tolist() == [1, 1]


def test_the_device_knows_greedy_rows_by_their_top_k():
    table, _, _ = make(params(), params(temperature=0.7, top_p=0.9), params(top_k=1, top_p=0.5))
    greedy = [1.0, 1.0, 1.0, 0.0]
    found = table.sampling.numbers_RN[:, :4]
    assert found[[0, 2, table.padding_row]].tolist() == [greedy] * 3
    assert found[1].tolist() == pytest.approx([0.7, V, 0.9, 0.0])
    table.apply(StepPlan(1, admitted=[NewRow(1, 0, b"", params(), seed=1)]))
    assert found[1].tolist() == greedy


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    found = draws(params(temperature=temperature), logits)
    torch.testing.assert_close(found, torch.softmax(logits / temperature, 0), atol=0.03, rtol=0)


def test_top_k_keeps_the_k_likeliest():
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])
    found = draws(params(temperature=1.0, top_k=2), logits)
    wanted = torch.softmax(logits[1:3], 0)
    torch.testing.assert_close(found[1:3], wanted, atol=0.03, rtol=0)
    assert found[0] == found[3] == 0


def test_top_p_keeps_the_smallest_set_that_holds_the_mass():
    probs = torch.tensor([0.05, 0.5, 0.3, 0.15])
    found = draws(params(temperature=1.0, top_p=0.6), probs.log())
    torch.testing.assert_close(found, torch.tensor([0, 0.625, 0.375, 0]), atol=0.03, rtol=0)


def test_min_p_is_relative_to_the_likeliest():
    probs = torch.tensor([0.04, 0.5, 0.3, 0.16])
    found = draws(params(temperature=1.0, min_p=0.5), probs.log())
    torch.testing.assert_close(found, torch.tensor([0, 0.625, 0.375, 0]), atol=0.03, rtol=0)


def test_top_k_and_top_p_are_both_of_the_whole_distribution():
    probs = torch.tensor([0.1, 0.4, 0.3, 0.2])
    found = draws(params(temperature=1.0, top_k=3, top_p=0.65), probs.log())
    torch.testing.assert_close(found, torch.tensor([0, 4 / 7, 3 / 7, 0]), atol=0.03, rtol=0)


def test_a_top_p_that_needs_more_than_the_candidates_sorts_everything():
    vocab = 3000  # a flat distribution: 1024 candidates hold a third of the mass
    _, sampler, rows = make(params(temperature=1.0, top_p=0.9), vocab=vocab)
    ids = [int(sample(sampler, torch.zeros(1, vocab), rows)) for _ in range(400)]
    assert 1024 < max(ids) < 0.91 * vocab
    assert len(set(ids)) > 200


def test_of_equal_tokens_those_with_the_lowest_ids_are_kept():
    vocab = 3000
    _, sampler, rows = make(*[params(temperature=1.0, top_k=4)] * 100, vocab=vocab)
    logits = torch.zeros(100, vocab)
    logits[:, 2000] = 0.1
    assert set(sample(sampler, logits, rows).tolist()) == {2000, 0, 1, 2}


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_gives_the_same_tokens_whatever_the_neighbours(device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, V, generator=generator).to(device)
    drawn = params(temperature=1.0)
    filtered = params(temperature=0.7, top_p=0.8)
    alone = []
    for sampling in (drawn, filtered):
        _, sampler, rows = make(sampling, device=device)
        alone.append([int(sample(sampler, row[None].clone(), rows)) for row in logits])
    table, sampler, rows = make(drawn, params(), filtered, device=device)
    table.sampling.seed_R[2] = 100
    together = [sample(sampler, row.repeat(3, 1), rows).tolist() for row in logits]
    assert [ids[0] for ids in together] == alone[0]
    assert [ids[2] for ids in together] == alone[1]


def test_a_request_that_comes_back_draws_on_where_it_stopped():
    logits = torch.randn(1, V)
    _, sampler, rows = make(params(temperature=1.0))
    ids = [int(sample(sampler, logits.clone(), rows)) for _ in range(5)]
    _, again, rows = make(params(temperature=1.0), num_output=3)
    assert [int(sample(again, logits.clone(), rows)) for _ in range(2)] == ids[3:]


def test_penalties_count_the_output_and_repetition_the_prompt_too():
    sampling = params(frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0)
    _, sampler, rows = make(sampling, prompt_ids=pack([1, 2]), output_ids=pack([3, 3, 4]))
    logits = torch.zeros(1, V)
    logits[0, :6] = torch.tensor([1.0, 1.0, -1.0, 4.0, 2.0, 0.9])
    sampler._edit(logits, rows, torch.from_numpy(rows).int())
    assert logits[0, :6].tolist() == pytest.approx(
        [1.0, 0.5, -2.0, 4 / 2 - 2 * 0.5 - 0.25, 2 / 2 - 0.5 - 0.25, 0.9]
    )


def test_a_sampled_token_is_penalised_from_then_on():
    _, sampler, rows = make(params(presence_penalty=1.0))
    logits = torch.zeros(1, V)
    logits[0, 5] = 0.6
    assert int(sample(sampler, logits.clone(), rows)) == 5
    assert int(sample(sampler, logits.clone(), rows)) != 5


def test_a_row_given_to_another_request_forgets_its_counts():
    table, sampler, rows = make(params(presence_penalty=1.0))
    logits = torch.zeros(1, V)
    logits[0, 5] = 0.6
    sample(sampler, logits.clone(), rows)
    table.apply(StepPlan(1, admitted=[NewRow(0, 0, b"", params(presence_penalty=1.0), seed=1)]))
    assert int(sample(sampler, logits.clone(), rows)) == 5


def test_end_of_sequence_is_masked_until_enough_tokens_are_out():
    _, sampler, rows = make(params(min_new_tokens=2), eos_ids=pack([7, 8]))
    logits = torch.zeros(1, V)
    logits[0, 7], logits[0, 8], logits[0, 9] = 3.0, 2.0, 1.0
    assert [int(sample(sampler, logits.clone(), rows)) for _ in range(3)] == [9, 9, 7]


def test_logit_bias_is_added():
    _, sampler, rows = make(params(logit_bias={3: 5.0, 4: -100.0}), params())
    logits = torch.zeros(2, V)
    logits[:, 4] = 2.0
    assert sample(sampler, logits, rows).tolist() == [3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_numbers_is_told_and_harms_no_other(value):
    table, sampler, rows = make(params(), params(temperature=1.0, top_p=0.9), params())
    logits = torch.zeros(3, V)
    logits[:, 2] = 9.0
    logits[:2, 4] = value
    assert sample(sampler, logits, rows).tolist() == [-1, -1, 2]
    assert table.last_token_R[:3].tolist() == [0, 0, 2]


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_position():
    seeds = torch.arange(200).repeat_interleave(200)
    positions = torch.arange(200, dtype=torch.int32).repeat(200)
    numbers = uniform(seeds, positions)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert len(numbers.unique()) == len(numbers)
    grid = numbers.view(200, 200)
    assert (
        abs(torch.corrcoef(torch.stack([grid[:, :-1].flatten(), grid[:, 1:].flatten()]))[0, 1])
        < 0.02
    )
