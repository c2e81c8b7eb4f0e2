"""Triton kernels against their torch references; without a GPU they are interpreted."""

from __future__ import annotations

import os

import pytest
import torch

from sgl.kernels import (
    triton_embedding,
    triton_gemv,
    triton_rms_norm,
    triton_rotary,
    triton_silu_and_mul,
    triton_step_tokens,
)
from sgl.kernels.collectives import TensorParallel
from sgl.kernels.embedding import embed_reference
from sgl.kernels.linear import linear_reference
from sgl.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from sgl.kernels.rotary import rotary_angles, rotate_and_store
from sgl.kernels.silu_and_mul import silu_and_mul_reference
from sgl.kernels.step_tokens import best_tokens_reference, take_tokens_reference

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

any_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@any_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (5, 576), (2, 4096)])
def test_rms_norm(shape, dtype):
    x_TD, weight_D = noise(*shape, dtype=dtype), noise(shape[1], seed=1)
    before_TD = x_TD.clone()
    got_TD = triton_rms_norm.rms_norm(x_TD, weight_D, 1e-5)
    assert_near(got_TD, rms_norm_reference(x_TD, weight_D, 1e-5))
    assert torch.equal(x_TD, before_TD)


@any_dtype
def test_add_rms_norm(dtype):
    streams = [noise(7, 100, dtype=dtype) for _ in range(2)]
    delta_TD, weight_D = noise(7, 100, dtype=dtype, seed=2), noise(100, seed=1)
    got_TD = triton_rms_norm.add_rms_norm(streams[0], delta_TD, weight_D, 1e-5)
    wanted_TD = add_rms_norm_reference(streams[1], delta_TD, weight_D, 1e-5)
    assert_near(got_TD, wanted_TD)
    assert_near(streams[0], streams[1])


@any_dtype
@pytest.mark.parametrize("shape", [(1, 2), (3, 200), (2, 4100)])
def test_silu_and_mul(shape, dtype):
    gate_up = noise(*shape, dtype=dtype)
    got_TF = triton_silu_and_mul.silu_and_mul(gate_up)
    assert_near(got_TF, silu_and_mul_reference(gate_up))


@any_dtype
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (9, 3, 80)])
def test_rotate_and_store(num_heads, num_kv_heads, head_dim, dtype):
    num_all = num_heads + 2 * num_kv_heads
    qkv = [noise(5, num_all, head_dim, dtype=dtype) for _ in range(2)]
    caches = [[torch.zeros(20, num_kv_heads, head_dim, dtype=dtype, device=DEVICE)
               for _ in range(2)] for _ in range(2)]  # fmt: skip
    slots_T = torch.tensor([3, 19, 0, 7, 8], device=DEVICE)
    frequencies_R = 0.7 ** torch.arange(head_dim // 2, device=DEVICE)
    angles = rotary_angles(torch.tensor([0, 1, 5, 900, 31], device=DEVICE), frequencies_R)
    triton_rotary.rotate_and_store(qkv[0], *angles, *caches[0], slots_T)
    on_cpu = [x.cpu() for x in (qkv[1], *angles, *caches[1], slots_T)]
    wanted_q = rotate_and_store(*on_cpu)
    assert_near(qkv[0][:, :num_heads].cpu(), wanted_q)
    assert_near(qkv[0][:, num_heads + num_kv_heads :], qkv[1][:, num_heads + num_kv_heads :])
    for got, wanted in zip(caches[0], on_cpu[3:5], strict=True):
        assert_near(got.cpu(), wanted)


@any_dtype
def test_embed(dtype):
    table_VD = noise(20, 100, dtype=dtype)
    token_ids_T = torch.tensor([0, 39, 20, 25, 19, 33], device=DEVICE)
    for first, num in ((0, 20), (20, 20), (20, 10)):
        got = triton_embedding.embed(token_ids_T, table_VD, first, num)
        assert torch.equal(got, embed_reference(token_ids_T, table_VD, first, num))


def test_take_tokens():
    pages = [torch.zeros(6, 9, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    last_token_R = torch.arange(100, 106, device=DEVICE)
    rows_T, positions_T = torch.tensor([5, 0, 3, 3, 3] * 40), torch.tensor([2, 16, 0, 1, 2] * 40)
    slots_T = torch.tensor([70, 8, 40, 41, 62] * 40)
    ids_T = torch.tensor([-1, -1, 7, 0, 9] * 40)
    inputs_4T = torch.stack([rows_T, positions_T, slots_T, ids_T]).int().to(DEVICE)
    got = triton_step_tokens.take_tokens(inputs_4T, last_token_R, pages[0], 2)
    wanted = take_tokens_reference(inputs_4T, last_token_R, pages[1], 2)
    assert got.tolist() == wanted.tolist() == [105, 100, 7, 0, 9] * 40
    assert torch.equal(*pages)


@pytest.mark.parametrize("vocab_size", [3, 5000])
def test_best_tokens(vocab_size):
    logits_BV = noise(6, vocab_size)
    logits_BV[1] = float("-inf")
    logits_BV[2, -1] = float("nan")
    logits_BV[3, 1:3] = 9.0  # of two best ones the first
    logits_BV[4, 0] = float("inf")
    rows_B = torch.tensor([7, 1, 0, 3, 2, 5], dtype=torch.int32, device=DEVICE)
    tables = [torch.full((9,), 55, device=DEVICE) for _ in range(2)]
    got = triton_step_tokens.best_tokens(logits_BV, rows_B, tables[0], TensorParallel())
    wanted = best_tokens_reference(logits_BV, rows_B, tables[1])
    assert got.tolist() == wanted.tolist()
    assert got[1:5].tolist() == [-1, -1, 1, -1]
    assert torch.equal(*tables)


@any_dtype
@pytest.mark.parametrize("shape", [(1, 1), (30, 100), (70, 1030)])
def test_gemv(shape, dtype):
    weight_OI, x_1I = noise(*shape, dtype=dtype), noise(1, shape[1], dtype=dtype, seed=1)
    got_1O = triton_gemv.gemv(x_1I, weight_OI, torch.float32)
    wanted_1O = linear_reference(x_1I.float(), weight_OI.float(), None, torch.float32)
    torch.testing.assert_close(got_1O, wanted_1O, atol=1e-3, rtol=1e-3)
    assert triton_gemv.gemv(x_1I, weight_OI, dtype).dtype == dtype


@pytest.mark.parametrize("tile", triton_gemv.TILES, ids=str)
def test_gemv_with_every_tile(tile):
    weight_OI, x_1I = noise(37, 1030), noise(1, 1030, seed=1)
    got_1O = torch.empty(1, 37, device=DEVICE)
    triton_gemv.Gemv(tile).run(x_1I, weight_OI, got_1O)
    wanted_1O = linear_reference(x_1I, weight_OI, None, torch.float32)
    torch.testing.assert_close(got_1O, wanted_1O, atol=1e-3, rtol=1e-3)
