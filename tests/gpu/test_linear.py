"""Products on a device: added to the residual stream by themselves, by kernels that were chosen."""

from __future__ import annotations

import pytest
import torch

from sgl.kernels import tuned_linear
from sgl.kernels.cublaslt import CublasLt, ProductShape
from sgl.kernels.linear import MIN_ADDED_ROWS, add_linear, can_add_linear, linear
from sgl.kernels.triton_gemv import Gemv

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [MIN_ADDED_ROWS, 1000])
def test_a_product_is_added_to_the_stream(num_rows, dtype):
    torch.manual_seed(0)
    x_TI = torch.randn(num_rows, 512, dtype=dtype, device="cuda")
    weight_OI = torch.randn(256, 512, dtype=dtype, device="cuda") / 16
    stream_TO = torch.randn(num_rows, 256, dtype=dtype, device="cuda")
    assert can_add_linear(x_TI)
    wanted_TO = stream_TO.double() + x_TI.double() @ weight_OI.double().t()
    add_linear(stream_TO, x_TI, weight_OI)
    eps = torch.finfo(dtype).eps
    # products, of up to 8, may be rounded before they are added
    torch.testing.assert_close(stream_TO.double(), wanted_TO, rtol=eps, atol=8 * eps)


def test_few_rows_are_left_to_the_norm():
    few_TI = torch.ones(MIN_ADDED_ROWS - 1, 64, dtype=torch.bfloat16, device="cuda")
    assert not can_add_linear(few_TI)


@pytest.mark.parametrize(
    ("out_dtype", "is_added"),
    [(None, False), (None, True), (torch.float32, False)],  # the stream is of the products' type
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whatever_cublaslt_lists_computes_the_product(dtype, out_dtype, is_added):
    torch.manual_seed(0)
    out_dtype = out_dtype or dtype
    library = CublasLt()
    for rows, outputs, inputs in [(7, 256, 512), (448, 768, 1024), (1000, 320, 64)]:
        x_TI = torch.randn(rows, inputs, dtype=dtype, device="cuda")
        weight_OI = torch.randn(outputs, inputs, dtype=dtype, device="cuda") / inputs**0.5
        before_TO = torch.randn(rows, outputs, dtype=out_dtype, device="cuda")
        wanted_TO = x_TI.double() @ weight_OI.double().t()
        if is_added:
            wanted_TO += before_TO.double()
        products = library.products(ProductShape(rows, outputs, inputs, dtype, out_dtype, is_added))
        assert products
        eps = torch.finfo(out_dtype).eps if out_dtype != torch.float32 else 1e-5
        for product in products:
            out_TO = before_TO.clone()
            product.run(x_TI, weight_OI, out_TO)
            torch.testing.assert_close(out_TO.double(), wanted_TO, rtol=eps, atol=8 * eps)


def test_what_was_chosen_runs_from_then_on_and_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned_linear, "MIN_GAIN", -1e9)  # whatever comes out is a gain
    monkeypatch.setattr(tuned_linear, "_choices", None)
    x_TI = torch.randn(64, 256, dtype=torch.bfloat16, device="cuda")
    weight_OI = torch.randn(512, 256, dtype=torch.bfloat16, device="cuda") / 16
    wanted_TO = x_TI.double() @ weight_OI.double().t()
    with tuned_linear.measuring(), torch.cuda.stream(torch.cuda.Stream()):
        linear(x_TI, weight_OI, None)
        linear(x_TI, weight_OI, None, torch.float32)
        linear(x_TI[:1], weight_OI, None)
        add_linear(torch.zeros(64, 512, dtype=torch.bfloat16, device="cuda"), x_TI, weight_OI)
    torch.cuda.synchronize()
    (kept,) = (tmp_path / "sgl").iterdir()
    assert len(kept.read_text().splitlines()) == 4 + 2  # and its braces
    assert tuned_linear.find_product(x_TI, weight_OI, torch.bfloat16)
    assert isinstance(tuned_linear.find_product(x_TI[:1], weight_OI, torch.bfloat16), Gemv)
    assert tuned_linear.find_product(x_TI[:63], weight_OI, torch.bfloat16) is None
    assert tuned_linear.find_product(x_TI[1:, 1:], weight_OI[:, 1:], torch.bfloat16) is None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TO = linear(x_TI, weight_OI, None)
        out_1O = linear(x_TI[:1], weight_OI, None)
    graph.replay()
    torch.testing.assert_close(out_1O.double(), wanted_TO[:1], rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(out_TO.double(), wanted_TO, rtol=8e-3, atol=8e-3)
