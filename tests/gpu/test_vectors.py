"""Vectors from a GPU are those from the CPU."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny_models import write_checkpoint
from vector_bench import VectorBench

from sgl.execution.attention.torch_attention import TorchAttention
from sgl.execution.attention.triton_attention import TritonAttention

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-3  # float32 products on tensor cores


@pytest.mark.parametrize("make_attention", [TorchAttention, TritonAttention])
@pytest.mark.parametrize("max_step_tokens", [256, 20])
def test_vectors_of_both_devices_are_equal(tmp_path, make_attention, max_step_tokens):
    write_checkpoint(tmp_path)
    chance = random.Random(0)
    prompts = [[chance.randrange(101) for _ in range(chance.randint(1, 90))] for _ in range(20)]
    wanted = VectorBench(tmp_path, is_embedding=True).vectors(prompts)
    bench = VectorBench(
        tmp_path,
        is_embedding=True,
        make_attention=make_attention,
        max_step_tokens=max_step_tokens,
        device=torch.device("cuda"),
    )
    for _ in range(2):  # the second time from the cache
        assert np.abs(bench.vectors(prompts) - wanted).max() <= TOLERANCE
