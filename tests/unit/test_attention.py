"""The back ends against attention done one request at a time over its own dense KV.

Without a GPU the Triton kernels are interpreted.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_case import TOLERANCE, Case

from sgl.execution.attention.gathered_keys import Changes, Members, Room
from sgl.execution.attention.shared_prefix import find_clusters
from sgl.execution.attention.torch_attention import TorchAttention
from sgl.execution.attention.triton_attention import TritonAttention
from sgl.execution.step_layout import StepLayout
from sgl.kernels import triton_extend_attention
from sgl.kernels.attention import attention, attention_reference, merge_attention
from sgl.kernels.triton_extend_attention import RunPlanner
from sgl.models.batch import AttentionSpec

BACKENDS = [TorchAttention, TritonAttention]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


# Triton's interpreter cannot multiply matrices of bfloat16
CASES = [
    *((backend, dtype, "cpu") for backend in BACKENDS for dtype in TOLERANCE
      if (backend, dtype) != (TritonAttention, torch.bfloat16)),
    *(pytest.param(backend, dtype, "cuda", marks=pytest.mark.gpu)
      for backend in BACKENDS for dtype in TOLERANCE),
]  # fmt: skip
any_backend = pytest.mark.parametrize("make_backend", BACKENDS)


@pytest.mark.parametrize(("make_backend", "dtype", "device"), CASES)
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(
    ("kv_lens", "query_lens"),
    [
        ([1], [1]),
        ([7], [7]),
        ([5, 5, 5], [1, 1, 1]),
        ([3, 90, 17, 1, 160], [1, 1, 1, 1, 1]),
        ([30, 9, 64, 12], [1, 1, 64, 5]),
        ([40, 41], [3, 40]),
    ],
)
def test_paged_ragged_mixed_steps(kv_lens, query_lens, page_size, dtype, device, make_backend):
    case = Case(kv_lens, query_lens, page_size=page_size, dtype=dtype, device=device)
    case.check(make_backend)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 70])
def test_programs_share_the_keys_of_a_chunk_of_a_long_prompt(window, device, monkeypatch):
    for name in ("MIN_PART_KEYS", "PART_UNIT"):
        monkeypatch.setattr(triton_extend_attention, name, 64)
    spec = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=16, scale=0.25, window=window)
    case = Case([50, 700, 90, 333], [1, 61, 90, 3], spec=spec, dtype=torch.float16, device=device)

    def with_programs(layers, cache):
        backend = TritonAttention(layers, cache)
        backend.planner = RunPlanner(backend.planner.run_len, num_programs=12)
        return backend

    backend = case.check(with_programs)
    assert backend.num_parts == 12
    num_merged = int((backend.plan_N8[:6, 3] > 1).sum())
    assert 2 <= num_merged < 6


def test_every_key_of_every_new_token_is_somebody_s_work():
    rng = np.random.default_rng(0)
    for _ in range(200):
        planner = RunPlanner(int(rng.choice([16, 32, 128])), int(rng.integers(1, 70)))
        num = int(rng.integers(1, 9))
        query_lens, starts = rng.integers(1, 400, num), rng.integers(0, 30_000, num)
        plan = planner.plan(np.arange(num), query_lens, starts, first_token=5)
        merges, runs = plan[: planner.max_merges], plan[planner.max_merges :]
        assert len(plan) <= planner.max_rows(int(query_lens.sum()), num)
        merged = {first + i: (token, num_tokens) for token, num_tokens, first, count in
                  merges[:, :4].tolist() for i in range(count)}  # fmt: skip
        work = np.zeros((int(query_lens.sum()), int((starts + query_lens).max())), np.int8)
        for row, token, position, num_tokens, begin, end, part, _ in runs.tolist():
            assert token - 5 - query_lens[:row].sum() == position - starts[row]
            assert 0 <= begin < end <= position + num_tokens
            assert (part == 0) == (begin == 0 and end == position + num_tokens)
            if part:
                assert merged.pop(part - 1) == (token, num_tokens)
            work[token - 5 : token - 5 + num_tokens, begin:end] += 1
        assert not merged
        assert len(runs) <= planner.num_programs + (-(-query_lens // planner.run_len)).sum()
        token = 0
        for length, start in zip(query_lens, starts, strict=True):
            for offset in range(length):
                assert (work[token, : start + offset + 1] == 1).all()
                token += 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("query_lens", [[1] * 6, [1, 1, 9, 4, 1, 20]])
def test_a_prefix_shared_by_many_is_attended_to_once(
    query_lens, page_size, dtype, device, monkeypatch
):
    monkeypatch.setattr(find_clusters, "__defaults__", (200,))
    kv_lens = [100 + 7 * index for index in range(6)]
    case = Case(kv_lens, query_lens, page_size=page_size, shared=64, dtype=dtype, device=device)
    backend = case.check(TorchAttention)
    assert all(piece.prefix is not None for piece in backend.pieces[None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_decodes", [6, 3])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("spec", [
    AttentionSpec(6, 2, 16, 0.25),
    AttentionSpec(40, 1, 16, 0.25, soft_cap=5.0),  # more than one block of requests
])  # fmt: skip
def test_triton_decodes_read_a_shared_prefix_once(
    spec, page_size, num_decodes, device, monkeypatch
):
    monkeypatch.setattr(find_clusters, "__defaults__", (100,))
    query_lens = [1] * num_decodes + [5] * (6 - num_decodes)
    kv_lens = [100 + 7 * index for index in range(6)]
    options = {"spec": spec, "dtype": torch.float32, "device": device}
    case = Case(kv_lens, query_lens, page_size=page_size, shared=64, **options)
    backend = case.check(TritonAttention)
    assert backend.prefixes.lens_B.tolist() == [64] * num_decodes
    assert backend.blocks.blocks[:, 1].sum() == num_decodes


@any_backend
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", [
    AttentionSpec(4, 4, 8, 0.3, window=5),
    AttentionSpec(4, 2, 8, 0.3, soft_cap=2.0),
    AttentionSpec(8, 1, 32, 0.2, window=20, soft_cap=30.0),
    AttentionSpec(9, 3, 80, 0.1),
])  # fmt: skip
def test_windows_soft_caps_and_odd_heads(spec, device, make_backend):
    case = Case([150, 9, 30, 50], [1, 1, 4, 50], spec=spec, dtype=torch.float32, device=device)
    case.check(make_backend)


def test_layers_with_different_windows_keep_their_own_copies():
    """From one decode step to the next each layer goes on with the keys it gathered."""
    specs = [AttentionSpec(4, 2, 8, 0.3, window=window) for window in (5, None)]
    options = {"dtype": torch.float32, "device": "cpu"}
    cases = [Case([30, 41], [1, 1], spec=spec, **options) for spec in specs]
    cache, table, layout = cases[0].cache, cases[0].table, cases[0].layout
    cache.keys_SKE.append(cases[1].cache.keys_SKE[0])
    cache.values_SKE.append(cases[1].cache.values_SKE[0])
    backend, inputs_4T = TorchAttention(specs, cache), torch.zeros((4, 2), dtype=torch.int32)
    for lens in ([29, 40], [30, 41]):  # the second step ends where the cases do
        step = StepLayout(layout.rows_B, layout.query_lens_B, np.array(lens), 2)
        backend.plan(step, table, inputs_4T)
        outputs = [backend.run(layer_id, cases[layer_id].q) for layer_id in range(2)]
    assert all(copy.joined_jL is None for copy in backend.copies)
    for case, output in zip(cases, outputs, strict=True):
        torch.testing.assert_close(output, case.expected(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    ("steps", "num_gathered"),
    [
        ([[0, 1, 2, 3], [0, 1, 2, 3]], 0),
        ([[0, 1, 2, 3], [3, 1, 0, 2]], 0),
        ([[0, 1, 2, 3], [0, 3]], 0),
        ([[0, 1, 2, 3], [4, 3]], 1),
        ([[0, 1, 2, 3], [0, 1, 3, 4], [5, 3, 4]], 1),
        ([[0, 1], [0, 1, 2, 3, 4]], 3),
        ([[0, 1], [0, 1, 2, 3, 4, 5]], 6),  # more than there is room for
        ([[0, 1], [2, 3]], 2),
        ([[0, 1, 2], [0, 1], [0, 1, 2]], 1),
    ],
)
def test_copied_keys_follow_the_coming_and_going_of_requests(steps, num_gathered, page_size):
    """In the last step only those that join are gathered."""
    options = {"dtype": torch.float32, "device": "cpu", "page_size": page_size}
    case = Case([30, 41, 33, 47, 38, 35], [1] * 6, **options)
    backend = TorchAttention([case.spec], case.cache)
    for num_left, members in zip(reversed(range(len(steps))), steps, strict=True):
        rows_B = case.layout.rows_B[members]
        lens_B = case.layout.kv_lens_B[members] - num_left
        step = StepLayout(rows_B, np.ones(len(members), np.int64), lens_B, len(members))
        backend.plan(step, case.table, torch.zeros((4, len(members)), dtype=torch.int32))
        output = backend.run(0, case.q[members])
    torch.testing.assert_close(output, case.expected()[members], atol=2e-5, rtol=0)
    [copy] = backend.copies
    assert len(copy.changes.joined) == num_gathered


def test_a_row_that_went_to_another_request_is_gathered_anew():
    before = Members([(0, 1), (1, 1), (2, 1)], np.array([10, 20, 30]))
    wanted = Members([(0, 2), (2, 1), (1, 1)], np.array([11, 31, 25]))
    changes = Changes.between(before, wanted)
    assert changes.order.tolist() == [0, 2, 1]
    assert changes.joined.tolist() == [0, 1]  # 25 does not come after 20
    assert changes.moves == []


def test_room_is_neither_too_small_nor_far_too_large():
    room = Room.around(8, 100)
    assert room.suits(12, 200)
    assert not room.suits(8, 300)
    assert not room.suits(30, 100)
    assert not room.suits(1, 20)


def test_merging_two_halves_gives_the_whole():
    q, k, v = (torch.randn(2, 3, length, 8) for length in (4, 10, 10))
    whole = attention(q, k, v, None, 0.5)
    halves = [attention_reference(q, k[:, :, s], v[:, :, s], None, 0.5) for s in
              (slice(0, 3), slice(3, 10))]  # fmt: skip
    merged = merge_attention(*halves[0], *halves[1])
    torch.testing.assert_close(merged, whole, atol=1e-6, rtol=1e-5)


def clusters_of(rows, starts, min_saved=4):
    width = max(map(len, rows))
    pages = np.array([row + [-i] * (width - len(row)) for i, row in enumerate(rows, 100)])
    found = find_clusters(pages, np.array(starts), 1, min_saved)
    return [(sorted(one.members.tolist()), one.shared_len) for one in found]


def test_requests_without_a_common_prefix_are_one_cluster_of_length_zero():
    assert clusters_of([[1, 2, 3], [4, 5, 6]], [3, 3]) == [([0, 1], 0)]


def test_a_deeper_prefix_of_fewer_wins_where_it_saves_more():
    long_a, long_b = [1, *range(10, 20)], [1, *range(30, 40)]
    rows = [[*long_a, 91], [*long_a, 92], [*long_b, 93], [*long_b, 94]]
    assert sorted(clusters_of(rows, [12] * 4)) == [([0, 1], 11), ([2, 3], 11)]


def test_a_prefix_of_all_wins_where_the_branches_are_short():
    rows = [[*range(10), 50 + i] for i in range(4)]
    assert clusters_of(rows, [11] * 4) == [([0, 1, 2, 3], 10)]


def test_the_shared_part_ends_before_the_queries():
    rows = [list(range(10)), list(range(10))]
    assert clusters_of(rows, [10, 6]) == [([0, 1], 6)]


def test_prefixes_within_prefixes_are_told_apart_up_to_a_depth():
    num = 1200  # request i shares i pages with all later ones
    pages = np.tile(np.arange(num + 1, dtype=np.int32), (num, 1))
    for row in range(num):
        pages[row, row:] = 10_000 + row
    found = find_clusters(pages, np.full(num, num + 1), 1, 2048)
    assert sorted(np.concatenate([one.members for one in found]).tolist()) == list(range(num))
    for cluster in found:
        shared = pages[cluster.members, : cluster.shared_len]
        assert (shared == shared[0]).all()
