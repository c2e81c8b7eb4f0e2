"""The sampler against the definition of every parameter, in float64 on the host, many rows at once.

A seed must draw the same token on every device: the reference shares no code with the sampler.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sgl.execution.request_table import RequestTable
from sgl.execution.sampler import Sampler
from sgl.kernels.sampling import sample_tokens
from sgl.kernels.sampling_table import SamplingTable
from sgl.messages import NewRow, StepPlan, pack
from sgl.sampling_params import SamplingParams

V = 5000
NUM_ROUNDS = 10
REAL_V = 128256
MASK = 2**64 - 1
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EOS_IDS, PROMPT_IDS = [7, 11], [3, 4, 5, 3]
PROMPT_LEN = len(PROMPT_IDS)

SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": -(2**63)},
    {"temperature": 0.3, "seed": 2**63 - 1},
    {"temperature": 1.5, "top_k": 5, "seed": 4},
    {"temperature": 1.5, "top_k": 3000, "seed": 5},
    {"temperature": 1.0, "top_p": 0.6, "seed": 6},
    {"temperature": 8.0, "top_p": 0.97, "seed": 7},
    {"temperature": 2.0, "min_p": 0.05, "seed": 8},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 9},
    {"temperature": 0.0, "frequency_penalty": 1.5},
    {"temperature": 0.0, "presence_penalty": 2.0},
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"temperature": 0.0, "repetition_penalty": 0.6, "frequency_penalty": -0.5},
    {"temperature": 1.0, "presence_penalty": 1.0, "top_p": 0.8, "seed": 10},
    {"temperature": 0.0, "min_new_tokens": 4, "logit_bias": {7: 50.0, 11: 40.0}},
    {"temperature": 1.0, "logit_bias": {100: 9.0, 200: 9.0, 300: -100.0}, "seed": 11},
]

# temperature, top-k, top-p, min-p
NUMBERS = [
    (1.0, 1, 1.0, 0.0),
    (0.8, REAL_V, 1.0, 0.0),
    (1.0, 50, 0.9, 0.0),
    (1.0, REAL_V, 0.95, 0.0),
    (1.4, 20_000, 1.0, 0.0),
    (0.3, 40, 1.0, 0.0),
    (1.0, REAL_V, 1.0, 0.02),
    (1.0, REAL_V, 0.999, 0.0),
    (0.7, 300, 0.8, 0.05),
]


def uniform(seed: int, position: int) -> float:
    """The splitmix64 number of a seed's stream."""
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return ((x ^ (x >> 31)) >> 11) / 2**53


def edited(logits: np.ndarray, sampling: SamplingParams, output_ids: list[int]) -> np.ndarray:
    logits = logits.astype(np.float64)
    counts = np.bincount(output_ids, minlength=V)
    is_repeated = counts > 0
    if sampling.repetition_penalty != 1.0:
        is_repeated[PROMPT_IDS] = True
    factor = sampling.repetition_penalty
    scaled = np.where(logits > 0, logits / factor, logits * factor)
    logits = np.where(is_repeated, scaled, logits)
    logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    if len(output_ids) < sampling.min_new_tokens:
        logits[EOS_IDS] = -np.inf
    for token_id, bias in (sampling.logit_bias or {}).items():
        logits[token_id] += bias
    return logits


def expected_token(logits: np.ndarray, sampling: SamplingParams, output_ids: list[int]) -> int:
    logits = edited(logits, sampling, output_ids)
    if sampling.is_greedy:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    probs, order = weights / weights.sum(), np.arange(V)
    if sampling.top_k != -1 or sampling.top_p < 1 or sampling.min_p > 0:
        order = np.argsort(-probs, kind="stable")
        probs = probs[order]
        is_kept = np.cumsum(probs) - probs <= sampling.top_p
        is_kept &= probs >= sampling.min_p * probs[0]
        if sampling.top_k != -1:
            is_kept &= np.arange(V) < sampling.top_k
        probs = probs * is_kept
    sums = np.cumsum(probs)
    draw = uniform(sampling.seed or 0, PROMPT_LEN - 1 + len(output_ids)) * sums[-1]
    return int(order[np.searchsorted(sums, draw, side="right")])


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_gets_the_token_its_parameters_define(device):
    samplings = [SamplingParams(**fields) for fields in SAMPLINGS]
    table = RequestTable(len(samplings) + 3, 4, V, torch.device(device))
    rows = np.random.default_rng(0).permutation(len(samplings) + 3)[: len(samplings)]
    admitted = [
        NewRow(
            int(row),
            0,
            b"",
            sampling,
            seed=sampling.seed or 0,
            eos_ids=pack(EOS_IDS),
            prompt_ids=pack(PROMPT_IDS) if sampling.repetition_penalty != 1.0 else b"",
        )
        for row, sampling in zip(rows, samplings, strict=True)
    ]
    table.apply(StepPlan(0, admitted=admitted))
    sampler = Sampler(table)
    output_ids: list[list[int]] = [[] for _ in samplings]
    generator = torch.Generator().manual_seed(0)
    for number in range(NUM_ROUNDS):
        # few likely tokens, the same in every row, so that some are sampled again and again
        logits_BV = (torch.randn(1, V, generator=generator) * 4).repeat(len(samplings), 1)
        logits_BV[:, :20] += 12.0
        wanted = [
            expected_token(logits_V.numpy(), sampling, ids)
            for logits_V, sampling, ids in zip(logits_BV, samplings, output_ids, strict=True)
        ]
        positions = np.full(len(rows), PROMPT_LEN - 1 + number)
        assert sampler.sample(logits_BV.to(device), rows, positions).tolist() == wanted
        for ids, token_id in zip(output_ids, wanted, strict=True):
            ids.append(token_id)
    assert table.last_token_R[torch.from_numpy(rows).to(device)].tolist() == wanted
    assert max(len(set(ids)) for ids in output_ids) > NUM_ROUNDS // 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_vocabulary_of_real_size_is_sampled_like_a_small_one(device):
    sampling = SamplingParams(temperature=0.7, top_p=0.9, seed=3)
    table = RequestTable(64, 4, REAL_V, torch.device(device))
    num_rows = 64 if device == "cuda" else 4
    rows = np.arange(num_rows)
    table.apply(
        StepPlan(0, admitted=[NewRow(int(row), 0, b"", sampling, seed=int(row)) for row in rows])
    )
    logits_BV = torch.full((num_rows, REAL_V), -20.0)
    logits_BV[:, [5, 70_000, 128_255]] = torch.tensor([3.0, 2.0, 1.0])
    positions = np.full(num_rows, 9)
    ids = Sampler(table).sample(logits_BV.to(device), rows, positions).tolist()
    # of the tempered masses 0.767, 0.184 and 0.049 two are needed for nine tenths
    share = float(np.exp(3 / 0.7) / (np.exp(3 / 0.7) + np.exp(2 / 0.7)))
    assert ids == [5 if uniform(int(row), 9) < share else 70_000 for row in rows]


def filled_table(num_rows: int, device: torch.device) -> SamplingTable:
    """Rows of every kind, and a last one that is greedy."""
    table = SamplingTable.greedy(num_rows + 1, device)
    for row in range(num_rows):
        temperature, top_k, top_p, min_p = NUMBERS[row % len(NUMBERS)]
        values = torch.tensor([temperature, top_k, top_p, min_p])
        table.numbers_RN[row, : len(values)] = values.to(device)
        table.seed_R[row] = row
    return table


def drawn(logits_BV: Tensor, table: SamplingTable, positions_B: Tensor) -> list[int]:
    num = len(logits_BV)
    rows_B = torch.arange(num, dtype=torch.int32, device=logits_BV.device)
    last_token_R = torch.zeros(num + 1, dtype=torch.int64, device=logits_BV.device)
    ids = sample_tokens(logits_BV, rows_B, positions_B, table, last_token_R).tolist()
    assert last_token_R.tolist() == [*ids, 0]
    return ids


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [4.0, 1.0, 0.01], ids=["peaked", "middling", "flat"])
def test_a_gpu_draws_what_the_cpu_draws(spread):
    """But for tokens side by side in the order of the draw, which rounding may exchange."""
    num = 36
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(num, REAL_V, generator=generator) * spread
    logits_BV[num // 2 :] = logits_BV[num // 2 :].bfloat16().float()  # with many equal ones
    positions_B = torch.arange(num, dtype=torch.int32)
    wanted = drawn(logits_BV, filled_table(num, torch.device("cpu")), positions_B)
    device = torch.device("cuda")
    table = filled_table(num, device)
    got = [drawn(logits_BV.to(device), table, positions_B.to(device)) for _ in range(3)]
    assert got[0] == got[1] == got[2]
    num_same = sum(one == other for one, other in zip(got[0], wanted, strict=True))
    assert num_same >= num - 2


@pytest.mark.gpu
def test_a_recorded_draw_reads_everything_anew():
    """Rows, positions, parameters and logits change between replays; the graph does not."""
    num, device = 8, torch.device("cuda")
    table = filled_table(num, device)
    logits_BV = torch.zeros(num, REAL_V, device=device)
    inputs_2B = torch.full((2, num), num, dtype=torch.int32, device=device)  # nobody's
    last_token_R = torch.zeros(num + 1, dtype=torch.int64, device=device)
    sample_tokens(logits_BV, *inputs_2B, table, last_token_R)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids_B = sample_tokens(logits_BV, *inputs_2B, table, last_token_R)
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        logits_BV.copy_(torch.randn(num, REAL_V, generator=generator) * 3)
        inputs_2B[0] = torch.randperm(num, generator=generator)
        inputs_2B[1] = number
        table.seed_R.add_(1)
        graph.replay()
        wanted = sample_tokens(logits_BV, *inputs_2B, table, torch.zeros_like(last_token_R))
        assert ids_B.tolist() == wanted.tolist()
        assert last_token_R[inputs_2B[0].long()].tolist() == wanted.tolist()
