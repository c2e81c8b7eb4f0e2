"""Products of many rows on a device that add to the residual stream themselves."""

from __future__ import annotations

import pytest
import torch

from sgl.kernels.linear import MIN_ADDED_ROWS, add_linear, can_add_linear

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
