"""Attention in the sizes of a real model, each request against its own dense attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sgl.execution.attention import AttentionBackend
from sgl.execution.attention.torch_attention import TorchAttention
from sgl.execution.attention.triton_attention import TritonAttention
from sgl.execution.forward_batch import ForwardBatch, step_inputs
from sgl.execution.kv_cache import KV_DTYPES, KvCache
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import StepLayout
from sgl.kernels.attention import attention_reference
from sgl.kernels.rotary import rotary_angles, rotate
from sgl.messages import Chunk, NewRow, StepPlan, pack
from sgl.models.batch import Angles, AttentionSpec
from sgl.sampling_params import SamplingParams

TOLERANCE = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BACKENDS = [TorchAttention, TritonAttention]
# Triton's interpreter cannot multiply matrices of bfloat16
CASES = [
    *((backend, dtype, "cpu") for backend in BACKENDS for dtype in TOLERANCE
      if (backend, dtype) != (TritonAttention, torch.bfloat16)),
    *(pytest.param(backend, dtype, "cuda", marks=pytest.mark.gpu)
      for backend in BACKENDS for dtype in TOLERANCE),
]  # fmt: skip
SPECS = {"cpu": AttentionSpec(4, 2, 16, 0.25), "cuda": AttentionSpec(32, 8, 128, 128**-0.5)}
SCALES = {"cpu": 1, "cuda": 16}  # lengths below are multiplied by it


@dataclass(frozen=True)
class Step:
    """Requests with `cached` tokens each, the first `shared` of them the same; then `num_new`."""

    cached: list[int]
    num_new: list[int]
    shared: int = 0

    def scaled(self, factor: int) -> Step:
        num_new = [num if num == 1 else num * factor for num in self.num_new]
        return Step([num * factor for num in self.cached], num_new, self.shared * factor)


STEPS = {
    "one decode": Step([130], [1]),
    "decodes of many lengths": Step([128, 3, 77, 20, 1, 64], [1] * 6),
    "prefills": Step([0, 0, 0, 0], [64, 3, 40, 7]),
    "chunks of longer prompts": Step([100, 37], [30, 29]),
    "decodes beside a prefill": Step([90, 60, 5, 0], [1, 1, 1, 50]),
    "decodes with one prompt": Step([400] * 7 + [410], [1] * 8, shared=390),
    "prefills behind one prompt": Step([390] * 7 + [0], [1, 1, 20, 15, 20, 1, 9, 12], shared=390),
}


class Bench:
    """A table, a cache with random KV, and a plan of one step."""

    def __init__(
        self, step: Step, page_size: int, spec: AttentionSpec, dtype, device, kv_dtype=None
    ) -> None:
        self.step, self.spec, self.device = step, spec, torch.device(device)
        self.rng = np.random.default_rng(0)
        lens = [cached + new for cached, new in zip(step.cached, step.num_new, strict=True)]
        counts = [-(-length // page_size) for length in lens]
        self.cache = KvCache(
            [spec],
            sum(counts),
            page_size,
            dtype=kv_dtype or dtype,
            model_dtype=dtype,
            device=self.device,
        )
        self.table = RequestTable(len(lens), max(counts), 500, self.device)
        self.pages = np.split(self.rng.permutation(sum(counts)), np.cumsum(counts)[:-1])
        sharing = [i for i, cached in enumerate(step.cached) if step.shared and cached]
        for index in sharing:
            num_shared = step.shared // page_size
            self.pages[index][:num_shared] = self.pages[sharing[0]][:num_shared]
        for tensor in (*self.cache.keys_SKE, *self.cache.values_SKE):
            generator = torch.Generator(self.device).manual_seed(1)
            tensor.copy_(torch.randn(tensor.shape, device=self.device, generator=generator))

    def plan(self) -> StepPlan:
        """Requests with one new token decode, the others prefill."""
        sampling = SamplingParams(temperature=0.0)
        admitted = [
            NewRow(row, cached, pack(pages.tolist()), sampling, seed=0)
            for row, (cached, pages) in enumerate(zip(self.step.cached, self.pages, strict=True))
        ]
        decodes = [row for row, num in enumerate(self.step.num_new) if num == 1]
        chunks = [
            Chunk(row, self.step.cached[row], pack(self.rng.integers(500, size=num)), b"", True)
            for row, num in enumerate(self.step.num_new)
            if num > 1
        ]
        return StepPlan(0, admitted=admitted, decode_rows=pack(decodes), chunks=chunks)

    def slots(self, row: int) -> torch.Tensor:
        size = self.cache.page_size
        positions = np.arange(self.step.cached[row] + self.step.num_new[row])
        slots = self.pages[row][positions // size] * size + positions % size
        return torch.from_numpy(slots).to(self.device)

    def dense(self, row: int, q_QHE: torch.Tensor) -> torch.Tensor:
        """Attention of a row's new tokens over its own keys and values."""
        slots = self.slots(row)
        group = self.spec.num_heads // self.spec.num_kv_heads
        k_1HLE, v_1HLE = (
            cache[slots].repeat_interleave(group, dim=1).transpose(0, 1).unsqueeze(0)
            for cache in (self.cache.keys_SKE[0], self.cache.values_SKE[0])
        )
        last_seen = torch.arange(len(slots) - len(q_QHE), len(slots), device=self.device)
        is_hidden = torch.arange(len(slots), device=self.device) > last_seen.unsqueeze(1)
        mask = torch.zeros(is_hidden.shape, device=self.device).masked_fill(is_hidden, -torch.inf)
        q_1HQE = q_QHE.transpose(0, 1).unsqueeze(0)
        o_1HQE, _ = attention_reference(q_1HQE, k_1HLE, v_1HLE, mask, self.spec.scale)
        return o_1HQE[0].transpose(0, 1)


@pytest.mark.parametrize(("make_backend", "dtype", "device"), CASES)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_every_request_attends_to_its_own_tokens(
    step, page_size, dtype, make_backend, device, record_property
):
    step, spec = step.scaled(SCALES[device]), SPECS[device]
    bench = Bench(step, page_size, spec, dtype, device)
    attention, error = run(bench, make_backend, dtype)
    if step.shared and make_backend is TorchAttention:
        assert any(piece.prefix for piece in attention.pieces[None])
    record_property("max_error", error)
    assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("make_backend", "dtype", "device"),
    [
        (TorchAttention, torch.float32, "cpu"),
        (TritonAttention, torch.float16, "cpu"),
        *(
            pytest.param(backend, torch.bfloat16, "cuda", marks=pytest.mark.gpu)
            for backend in BACKENDS
        ),
    ],
)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=KV_DTYPES)
def test_keys_and_values_of_eight_bits(kv_dtype, dtype, make_backend, device):
    step, spec = STEPS["decodes beside a prefill"].scaled(SCALES[device]), SPECS[device]
    bench = Bench(step, 1, spec, dtype, device, kv_dtype)
    assert bench.cache.keys_SKE[0].itemsize == 1
    _, error = run(bench, make_backend, dtype)
    assert error <= TOLERANCE[dtype]


def run(bench: Bench, make_backend, dtype) -> tuple[AttentionBackend, float]:
    """Run the step; the back end, and the largest difference from dense attention."""
    step, spec, device = bench.step, bench.spec, bench.device
    page_size = bench.cache.page_size
    plan, attention = bench.plan(), make_backend([spec], bench.cache)
    layout = StepLayout.of(plan, bench.table.apply(plan), bench.table)
    inputs = step_inputs(plan.chunks, layout, bench.table, page_size)
    inputs_4T = bench.table.to_device(inputs)[:, : layout.num_tokens]
    batch = ForwardBatch(inputs_4T, bench.table, attention)
    attention.plan(layout, bench.table, inputs_4T)
    generator = torch.Generator(device).manual_seed(2)
    num_heads = spec.num_heads + 2 * spec.num_kv_heads
    shape = (sum(step.num_new), num_heads, spec.head_dim)
    qkv_TNE = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    frequencies_R = 1e4 ** -(torch.arange(0, spec.head_dim, 2, device=device) / spec.head_dim)
    angles = rotary_angles(batch.positions_T, frequencies_R)
    turned_TNE = qkv_TNE.clone()
    rotate(turned_TNE[:, : spec.num_heads + spec.num_kv_heads], *angles)
    q_THE, k_TKE, _ = turned_TNE.split(
        (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1
    )

    found_THE = batch.attend(0, qkv_TNE, Angles(*angles))

    ends = layout.token_ends
    newest = layout.outputs(np.arange(len(ends)), bench.table)
    newest_WHE = attention.run_outputs(0, q_THE, newest)
    torch.testing.assert_close(
        newest_WHE, found_THE[ends - 1], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    wanted_THE = torch.cat(
        [
            bench.dense(int(row), q_THE[end - num : end])
            for row, end, num in zip(layout.rows_B, ends, layout.query_lens_B, strict=True)
        ]
    )
    for row, end, num in zip(layout.rows_B, ends, layout.query_lens_B, strict=True):
        stored_TKE = bench.cache.keys_SKE[0][bench.slots(row)[-num:]]
        k_new_TKE = k_TKE[end - num : end].to(stored_TKE.dtype)
        # to the last bit: products and sums may be fused, or not
        last_bit = torch.finfo(stored_TKE.dtype).eps
        torch.testing.assert_close(stored_TKE.float(), k_new_TKE.float(), rtol=last_bit, atol=1e-5)
    return attention, (found_THE.float() - wanted_THE.float()).abs().max().item()
