"""The flashinfer back end over a stand-in that attends to the pages it is told.

On a GPU tests/gpu/test_flashinfer.py runs the real one.
"""

from __future__ import annotations

import logging
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_case import TOLERANCE, Case
from fake_flashinfer import FakeFlashinfer

from sgl.errors import ConfigError
from sgl.execution.attention import flashinfer_attention, triton_attention
from sgl.execution.attention.choice import make_backend
from sgl.execution.attention.flashinfer_attention import FlashinferAttention
from sgl.execution.attention.flashinfer_kernels import (
    HostPages,
    check_supported,
    offsets,
    recorded_workspace_bytes,
    unrecorded_workspace_bytes,
)
from sgl.execution.recorded_inputs import GraphShape, RecordedInputs
from sgl.execution.step_layout import StepLayout
from sgl.kernels import triton_page_lists
from sgl.kernels.page_lists import PageLists, write_page_lists_reference
from sgl.models.batch import AttentionSpec

CPU = torch.device("cpu")
KERNEL_DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.1)


def backend_of(library):
    return lambda layers, cache: FlashinferAttention(layers, cache, library)


def make_case(kv_lens, query_lens, spec=SPEC, dtype=torch.bfloat16, **options):
    return Case(kv_lens, query_lens, spec=spec, dtype=dtype, device="cpu", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(
    ("kv_lens", "query_lens"),
    [
        ([1], [1]),
        ([7], [7]),
        ([3, 90, 17, 1, 160], [1, 1, 1, 1, 1]),
        ([30, 9, 64, 12], [1, 1, 64, 5]),
        ([40, 41], [3, 40]),
    ],
)
def test_every_request_of_a_step_attends_to_its_own_pages(kv_lens, query_lens, page_size, dtype):
    case = make_case(kv_lens, query_lens, dtype=dtype, page_size=page_size)
    case.check(backend_of(FakeFlashinfer()))


@pytest.mark.parametrize("spec", [
    AttentionSpec(4, 4, 64, 0.1, window=5),
    AttentionSpec(4, 2, 128, 0.1, soft_cap=2.0),
    AttentionSpec(8, 1, 256, 0.05, window=1, soft_cap=30.0),
])  # fmt: skip
def test_windows_and_soft_caps(spec):
    case = make_case([150, 9, 30, 50], [1, 1, 4, 50], spec=spec, page_size=4)
    case.check(backend_of(FakeFlashinfer()))


def test_a_step_is_planned_from_lengths_that_the_host_knows():
    library = FakeFlashinfer()
    case = make_case([30, 16, 64, 12], [1, 1, 64, 5], page_size=16)
    backend = backend_of(library)([SPEC], case.cache)
    library.plans.clear()  # those that make flashinfer compile
    backend.plan(case.layout, case.table, case.inputs())
    assert library.plans == [
        ("decode", [0, 2, 3], [14, 16]),
        ("prefill", [0, 4, 5], [16, 12]),
    ]
    assert backend.kernels[SPEC].prefill.wrapper.query_indptr == [0, 64, 69]


def test_lengths_become_pages():
    pages = HostPages.of(np.array([5, 16, 33]), 16, CPU)
    assert (pages.indptr_B.tolist(), pages.last_lens_B.tolist()) == ([0, 1, 2, 5], [5, 16, 1])
    assert pages.total == 5
    assert offsets(np.array([3, 1]), CPU).tolist() == [0, 3, 4]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (5, 300), (50, 3)])
def test_page_lists_of_the_triton_kernel(num_rows, width, page_size, monkeypatch):
    monkeypatch.setattr(triton_page_lists, "BLOCK", 16)
    rng = np.random.default_rng(num_rows)
    pages_RP = torch.from_numpy(rng.integers(0, 10**6, (num_rows + 2, width)).astype(np.int32))
    rows_B = torch.from_numpy(rng.permutation(num_rows + 2)[:num_rows].astype(np.int32))
    positions_B = torch.from_numpy(rng.integers(0, width * page_size, num_rows).astype(np.int32))
    positions_B[0] = width * page_size - 1
    room = int((positions_B // page_size + 1).sum()) + 3

    def lists(device):
        return PageLists.empty(num_rows, torch.full((room,), -1, dtype=torch.int32, device=device))

    wanted, got = lists("cpu"), lists(KERNEL_DEVICE)
    write_page_lists_reference(pages_RP, rows_B, positions_B, page_size, wanted)
    on_device = [x.to(KERNEL_DEVICE) for x in (pages_RP, rows_B, positions_B)]
    triton_page_lists.write_page_lists(*on_device, page_size, got)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.tolist() == theirs.tolist()
    assert wanted.indptr_B[-1] == room - 3


class Recorded:
    """Decodes of layers of two kinds, as a graph for `size` requests runs them."""

    specs = (SPEC, SPEC._replace(window=7, soft_cap=9.0))

    def __init__(self, kv_lens, size, page_size) -> None:
        self.cases = [
            make_case(kv_lens, [1] * len(kv_lens), spec=spec, page_size=page_size)
            for spec in self.specs
        ]
        self.table, cache = self.cases[0].table, self.cases[0].cache
        cache.keys_SKE.append(self.cases[1].cache.keys_SKE[0])
        cache.values_SKE.append(self.cases[1].cache.values_SKE[0])
        self.library, self.size = FakeFlashinfer(), size
        self.backend = FlashinferAttention(list(self.specs), cache, self.library)
        self.table.device_pages_RP[self.table.padding_row] = cache.padding_page
        self.shape = GraphShape(size, size)
        self.inputs = RecordedInputs(self.shape, self.table, cache.padding_page * page_size)
        self.replay()  # what a graph would have recorded
        self.library.plans.clear()

    def replay(self) -> list[torch.Tensor]:
        q_SHE = torch.zeros((self.size, *self.cases[0].q.shape[1:]), dtype=torch.bfloat16)
        q_SHE[: len(self.cases[0].q)] = self.cases[0].q
        self.backend.plan_recorded(self.table, self.inputs, 0)
        return [self.backend.run(layer_id, q_SHE) for layer_id in range(2)]


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_graph_is_planned_anew_and_lists_the_pages_of_the_step(page_size):
    recorded = Recorded([30, 90, 16], 5, page_size)
    layout = recorded.cases[0].layout
    assert recorded.backend.num_variants(recorded.shape) == 1
    assert recorded.backend.can_replay(layout)
    assert recorded.backend.choose_variant(layout, recorded.table, recorded.shape) == 0
    ends = np.cumsum([-(-length // page_size) for length in (30, 90, 16, 1, 1)]).tolist()
    last_lens = [14, 10, 16, 1, 1] if page_size == 16 else [1] * 5
    assert recorded.library.plans == [("replay", [0, *ends], last_lens)] * 2

    recorded.inputs.tokens_4T[:, :3] = recorded.cases[0].inputs()
    outputs = recorded.replay()
    assert len(recorded.library.plans) == 2, "what is in a graph cannot plan"
    for case, output in zip(recorded.cases, outputs, strict=True):
        torch.testing.assert_close(
            output[:3].float(), case.expected(), atol=TOLERANCE[torch.bfloat16], rtol=0
        )


def test_a_step_that_is_not_recorded_comes_between_two_that_are():
    recorded = Recorded([30, 90, 16], 4, 4)
    case = recorded.cases[0]
    recorded.backend.plan(case.layout, recorded.table, case.inputs())
    output = recorded.backend.run(0, case.q)
    torch.testing.assert_close(output.float(), case.expected(), atol=2e-2, rtol=0)
    recorded.backend.choose_variant(case.layout, recorded.table, recorded.shape)
    recorded.inputs.tokens_4T[:, :3] = case.inputs()
    torch.testing.assert_close(recorded.replay()[0][:3], output, atol=0, rtol=0)


def test_a_step_with_more_pages_than_a_graph_has_room_for_runs_without_it(monkeypatch):
    monkeypatch.setattr(flashinfer_attention, "SHARING", 1)
    recorded = Recorded([9, 9], 2, 1)
    room = recorded.backend.cache.padding_page + len(recorded.table.pages_RP)
    for total, fits in ((room - 2, True), (room, False)):  # two may be filled up
        layout = StepLayout(np.arange(2), np.ones(2), np.array([total - 1, 1]), 2)
        assert recorded.backend.can_replay(layout) is fits


@pytest.mark.parametrize(
    ("dtype", "head_dim", "lack"),
    [(torch.float32, 64, "the dtype float32"), (torch.float16, 80, "heads of size 80")],
)
def test_models_without_kernels_are_refused(dtype, head_dim, lack):
    spec = SPEC._replace(head_dim=head_dim)
    said = f"--attention-backend flashinfer has no kernels for {lack}: use triton"
    with pytest.raises(ConfigError, match=said):
        check_supported([SPEC, spec], dtype)


def test_workspaces_hold_the_parts_of_the_largest_step():
    llama_8b = AttentionSpec(32, 8, 128, 0.1)
    assert unrecorded_workspace_bytes(llama_8b, 132) == 128 * 2**20
    # 2 * 132 / 8 parts run at a time; 1024 decodes fill 256 tiles of 16 heads, or 1023 more
    assert recorded_workspace_bytes(llama_8b, 132, 1) == 32 * 33 * 16 * 129 * 4 + 2**20
    assert recorded_workspace_bytes(llama_8b, 132, 1024) == 32 * 1279 * 16 * 129 * 4 + 2**20


@pytest.fixture
def on_cuda(monkeypatch):
    """A cache that says it is on a GPU, and a Triton back end that needs none."""
    monkeypatch.setattr(triton_attention, "TritonAttention", lambda layers, cache: "triton")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    keys = SimpleNamespace(device=torch.device("cuda"))
    return SimpleNamespace(keys_SKE=[keys], model_dtype=torch.bfloat16)


def test_without_flashinfer_triton_runs_and_one_warning_says_why(on_cuda, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert make_backend("flashinfer", [SPEC], on_cuda) == "triton"
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert 'pip install "sgl[cuda]"' in record.getMessage()


def test_a_failed_build_is_told_in_one_line(on_cuda, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("Ninja build failed. Ninja output:\n[1/9] nvcc ...\nkilled")

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace())
    monkeypatch.setattr(flashinfer_attention, "FlashinferAttention", fail)
    assert make_backend("flashinfer", [SPEC], on_cuda) == "triton"
    [message] = [record.getMessage() for record in caplog.records]
    assert "(RuntimeError: Ninja build failed. Ninja output:)" in message
    assert "killed" not in message


def test_a_model_without_kernels_stops_the_start(on_cuda):
    on_cuda.model_dtype = torch.float32
    with pytest.raises(ConfigError, match="use triton"):
        make_backend("flashinfer", [SPEC], on_cuda)


def test_on_the_cpu_flashinfer_is_refused():
    case = make_case([3], [1])
    with pytest.raises(ConfigError, match="--attention-backend flashinfer needs a GPU"):
        make_backend("flashinfer", [SPEC], case.cache)
