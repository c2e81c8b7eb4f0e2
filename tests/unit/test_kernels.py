"""The kernels against the formulas they implement, computed in float64."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from sgl.kernels.attention import attention
from sgl.kernels.packed_linear import can_pack, pack, packed_linear, packed_linear_reference
from sgl.kernels.rms_norm import add_rms_norm, rms_norm
from sgl.kernels.rotary import rotary_angles, rotate
from sgl.kernels.silu_and_mul import silu_and_mul

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

any_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
any_rows = pytest.mark.parametrize("num_rows", [0, 1, 7, 33, 64])


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


def exact_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    mean_T1 = x_TD.double().square().mean(dim=-1, keepdim=True)
    return x_TD.double() / (mean_T1 + eps).sqrt() * weight_D.double()


@pytest.mark.parametrize("size", [1, 111, 576])
@any_rows
@any_dtype
def test_rms_norm_is_its_formula_and_keeps_its_input(num_rows, size, dtype):
    x_TD, weight_D = noise(num_rows, size, dtype=dtype), noise(size, seed=1)
    before_TD = x_TD.clone()
    assert_near(rms_norm(x_TD, weight_D, 1e-5), exact_norm(x_TD, weight_D, 1e-5))
    assert torch.equal(x_TD, before_TD)


def test_rms_norm_of_a_zero_row_is_zero():
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


@any_dtype
def test_add_rms_norm_adds_into_the_stream_and_norms_the_sum(dtype):
    stream_TD, delta_TD = noise(5, 48, dtype=dtype), noise(5, 48, dtype=dtype, seed=1)
    sum_TD, weight_D = stream_TD + delta_TD, noise(48, seed=2)
    got_TD = add_rms_norm(stream_TD, delta_TD, weight_D, 1e-5)
    assert torch.equal(stream_TD, sum_TD)
    assert_near(got_TD, exact_norm(sum_TD, weight_D, 1e-5))


def test_rms_norm_refuses_a_weight_of_another_length():
    with pytest.raises(AssertionError, match="does not end in"):
        rms_norm(torch.ones(2, 8), torch.ones(4), 1e-5)


@pytest.mark.parametrize("head_dim", [2, 64, 80])
@any_rows
@any_dtype
def test_rotate_turns_pairs_as_complex_numbers(num_rows, head_dim, dtype):
    frequencies_R = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2) / head_dim)
    positions_T = torch.arange(num_rows) * 3
    whole = noise(num_rows, 5, head_dim, dtype=dtype)
    x_TNE = whole[:, 1:4]  # rows apart from each other, as in the output of a fused linear
    untouched = whole.clone()
    real, imaginary = x_TNE.double().chunk(2, dim=-1)
    angles_TR = positions_T[:, None].double() * frequencies_R.double()
    turned = torch.complex(real, imaginary) * torch.exp(1j * angles_TR)[:, None]
    rotate(x_TNE, *rotary_angles(positions_T, frequencies_R))
    assert_near(x_TNE, torch.cat((turned.real, turned.imag), dim=-1))
    assert torch.equal(whole[:, [0, 4]], untouched[:, [0, 4]])


@pytest.mark.parametrize("size", [1, 33, 1536])
@any_rows
@any_dtype
def test_silu_and_mul_is_its_formula(num_rows, size, dtype):
    gate_up = noise(num_rows, 2 * size, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_near(silu_and_mul(gate_up), gate / (1.0 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("has_bias", [False, True])
@any_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_linear_is_the_plain_one(num_rows, has_bias, dtype):
    if not can_pack(torch.device("cpu"), dtype):
        pytest.skip("this CPU has no packed form for the type")
    x_TI, weight_OI = noise(num_rows, 48, dtype=dtype), noise(35, 48, dtype=dtype, seed=1) / 7
    bias_O = noise(35, dtype=dtype, seed=2) if has_bias else None
    got_TO = packed_linear(x_TI, pack(weight_OI), bias_O)
    assert_near(got_TO, packed_linear_reference(x_TI, weight_OI, bias_O).double())


def test_products_of_all_sizes_keep_no_memory():
    dtype = torch.bfloat16
    if not can_pack(torch.device("cpu"), dtype):
        pytest.skip("this CPU has no packed form for the type")
    packed_OI, x_TI = pack(noise(448, 128, dtype=dtype)), noise(2048, 128, dtype=dtype)
    for num_rows in range(1, 2049, 32):
        packed_linear(x_TI[:num_rows], packed_OI, None)
    before = resident_mib()
    for num_rows in range(40, 2048, 3):
        assert packed_linear(x_TI[:num_rows], packed_OI, None).shape == (num_rows, 448)
    assert resident_mib() - before < 32  # 700 with a kernel for each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_of_all_lengths_keeps_no_memory(dtype):
    def attend(num_queries: int, num_keys: int) -> None:
        q, k = noise(1, 2, num_queries, 16, dtype=dtype), noise(1, 2, num_keys, 16, dtype=dtype)
        attention(q, k, k, None, 0.25)

    random = Random(0)
    attend(256, 1024)
    before = resident_mib()
    for _ in range(1000):
        attend(random.randint(2, 256), random.randint(1, 1024))
    assert resident_mib() - before < 32  # 90 with kernels for all of them
    assert torch.backends.mkldnn.enabled


def resident_mib() -> float:
    """Memory of this process that is in use."""
    num_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def test_half_precision_has_no_packed_form():
    assert not can_pack(torch.device("cpu"), torch.float16)
