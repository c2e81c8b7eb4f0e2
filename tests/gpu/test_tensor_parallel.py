"""Two GPUs give the tokens that one gives, however the sums go from one to the other."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import sgl

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [50, 40, 30, 20, 10], [8] * 40, [*range(100)]]
SAMPLING = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
# shaped like SmolLM2-135M, with numbers of heads that two ranks can divide
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 4,
}
WAYS = {
    "graphs": {},
    "without graphs": {"disable_cuda_graph": True},
    "NCCL": {"disable_custom_all_reduce": True},
    "without overlap, checked": {"disable_overlap_schedule": True, "enable_p2p_check": True},
}

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def answers(folder: str, **flags: object) -> list[list[int]]:
    engine = sgl.Engine(
        model_path=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        cuda_graph_max_bs=8,
        max_total_tokens=4096,
        log_level="warning",
        **flags,
    )
    with engine:
        outputs = engine.generate(input_ids=PROMPTS, sampling_params=SAMPLING)
    return [output["output_ids"] for output in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_models.write_checkpoint(path, **SHAPE)
    return str(path)


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    return answers(folder)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("flags", WAYS.values(), ids=list(WAYS))
def test_two_gpus_answer_as_one(flags, folder, expected):
    assert answers(folder, tp_size=2, **flags) == expected
