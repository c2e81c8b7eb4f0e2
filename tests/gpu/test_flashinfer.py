"""flashinfer's own kernels, each request against dense attention. They are compiled first.

Each of `SPECS` is a family of kernels, which takes a minute or two to compile the first time.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from attention_case import Case

from sgl.execution.attention.flashinfer_attention import FlashinferAttention
from sgl.execution.recorded_inputs import GraphShape, RecordedInputs
from sgl.execution.step_layout import StepLayout
from sgl.models.batch import AttentionSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # flashinfer and what it imports have some of their own
]

TOLERANCE = 3e-2  # of values up to 4 in bfloat16, or with the tanh of a soft cap in 11 bits
LLAMA = AttentionSpec(32, 8, 128, 128**-0.5)
SPECS = {
    "heads of 128": (LLAMA, torch.bfloat16),
    "heads of 64, window, soft cap": (
        AttentionSpec(14, 2, 64, 0.125, window=100, soft_cap=20.0),
        torch.float16,
    ),
    "heads of 256, window": (AttentionSpec(8, 4, 256, 0.0625, window=700), torch.bfloat16),
}
STEPS = {
    "decodes": ([1500, 3, 770, 16, 1, 640], [1] * 6),
    "decodes beside chunks": ([900, 60, 1, 1200, 333, 40], [1, 1, 1, 300, 333, 7]),
    "chunks": ([130, 2000, 17], [129, 5, 17]),
}


@pytest.fixture(scope="module")
def library():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("flashinfer")


def make_case(kv_lens, query_lens, page_size, spec, dtype):
    """The queries lie as in a step: beside the keys and values of their tokens."""
    case = Case(kv_lens, query_lens, page_size=page_size, spec=spec, dtype=dtype, device="cuda")
    num_heads = spec.num_heads + 2 * spec.num_kv_heads
    qkv_TNE = torch.zeros((len(case.q), num_heads, spec.head_dim), dtype=dtype, device="cuda")
    qkv_TNE[:, : spec.num_heads] = case.q
    case.q = qkv_TNE[:, : spec.num_heads]
    return case


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(("spec", "dtype"), SPECS.values(), ids=SPECS)
def test_every_request_attends_to_its_own_tokens(
    spec, dtype, step, page_size, library, record_property
):
    case = make_case(*step, page_size, spec, dtype)
    with torch.inference_mode():
        _, output = case.run(lambda layers, cache: FlashinferAttention(layers, cache, library))
    error = (output - case.expected()).abs().max().item()
    record_property("max_error", error)
    assert error <= TOLERANCE


class Graphs:
    """Graphs of two batch sizes over the same requests, as `StepGraphs` records them."""

    sizes = (48, 9)

    def __init__(self, case: Case, library) -> None:
        self.case, self.table = case, case.table
        self.backend = FlashinferAttention([case.spec], case.cache, library)
        self.table.device_pages_RP[self.table.padding_row] = case.cache.padding_page
        shapes = [GraphShape(size, size) for size in self.sizes]
        slot = case.cache.padding_page * case.cache.page_size
        self.inputs = {shape: RecordedInputs(shape, self.table, slot) for shape in shapes}
        self.q_SHE = torch.zeros_like(case.q[:1]).repeat(self.sizes[0], 1, 1)
        self.recorded = {shape: self.record(shape) for shape in shapes}

    def record(self, shape: GraphShape) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        def step() -> torch.Tensor:
            self.backend.plan_recorded(self.table, self.inputs[shape], 0)
            return self.backend.run(0, self.q_SHE[: shape.num_tokens])

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out_SHE = step()
        return graph, out_SHE

    def replay(self, size: int, chosen: np.ndarray) -> torch.Tensor:
        """The output of some of the requests."""
        layout, num = self.case.layout, len(chosen)
        part = StepLayout(
            layout.rows_B[chosen], layout.query_lens_B[chosen], layout.kv_lens_B[chosen], num
        )
        shape = GraphShape(size, size)
        assert self.backend.can_replay(part)
        self.backend.choose_variant(part, self.table, shape)
        inputs_4B = np.zeros((4, num), np.int32)
        inputs_4B[0], inputs_4B[1] = part.rows_B, part.kv_lens_B - 1
        self.inputs[shape].fill(inputs_4B, part, np.arange(num), np.zeros((0, 8), np.int32))
        self.q_SHE[:num] = self.case.q[torch.from_numpy(chosen).cuda()]
        graph, out_SHE = self.recorded[shape]
        graph.replay()
        return out_SHE[:num].float().cpu()


@torch.inference_mode()
@pytest.mark.parametrize("page_size", [1, 16])
def test_recorded_steps_of_changing_requests(page_size, library):
    rng = np.random.default_rng(0)
    kv_lens = [2500, 1, 16, 17, *rng.integers(1, 900, 44).tolist()]
    case = make_case(kv_lens, [1] * 48, page_size, LLAMA, torch.bfloat16)
    graphs, wanted_BHE = Graphs(case, library), case.expected()
    for size, num in [(48, 48), (9, 9), (48, 30), (9, 2), (9, 7), (48, 41)]:
        chosen = rng.permutation(48)[:num]
        output_BHE = graphs.replay(size, chosen)
        error = (output_BHE - wanted_BHE[torch.from_numpy(chosen)]).abs().max().item()
        assert error <= TOLERANCE
    graphs.backend.plan(case.layout, case.table, case.inputs())
    unrecorded_BHE = graphs.backend.run(0, case.q).float().cpu()
    recorded_BHE = graphs.replay(48, np.arange(48))
    torch.testing.assert_close(recorded_BHE, unrecorded_BHE, atol=1e-2, rtol=1e-2)
