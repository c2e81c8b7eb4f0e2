"""Flags of the server: what may be typed, what it means, what is refused and how that reads."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from sgl.compatibility import ACCEPTED, OF_VLLM, REFUSED
from sgl.config import FIELD_OPTIONS, GROUPS, OPTIONS, ServerConfig
from sgl.errors import ConfigError
from sgl.flags import Refused

ROOT = Path(__file__).parents[2]
VALUE_OF_KIND = {int: "1", float: "0.5", str: "text"}


@pytest.fixture(autouse=True)
def _no_keys_in_the_environment(monkeypatch):
    for variable in ("API_KEY", "ADMIN_API_KEY"):
        monkeypatch.delenv(f"SGL_{variable}", raising=False)
        monkeypatch.delenv(f"SGLANG_{variable}", raising=False)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        ServerConfig.from_argv(argv)
    return str(caught.value)


def test_documented_flags_are_the_real_ones():
    path = ROOT / "scripts" / "flags_doc.py"
    spec = importlib.util.spec_from_file_location("flags_doc", path)
    flags_doc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags_doc)
    written = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert written == flags_doc.document(), "run `make docs`"


def test_nothing_typed_means_all_defaults():
    config = ServerConfig.from_argv([])
    assert config == ServerConfig()
    assert (config.host, config.port, config.model_name) == (
        "127.0.0.1",
        30000,
        "SmolLM2-135M-Instruct",
    )


@pytest.mark.parametrize("option", FIELD_OPTIONS, ids=lambda option: option.key)
def test_each_name_of_a_flag_fills_its_field(option):
    text = option.flag.choices[-1] if option.flag.choices else VALUE_OF_KIND.get(option.kind)
    words = [] if option.kind is bool else [text]
    parsed = [OPTIONS.parse_argv([name, *words]) for name in option.names]
    assert parsed == [{option.key: True if option.kind is bool else option.kind(text)}] * len(
        option.names
    )


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("--tp", "tp_size"),
        ("--tensor-parallel-size", "tp_size"),
        ("--tensor", "tp_size"),
        ("--model", "model_path"),
        ("--mem-frac", "mem_fraction_static"),
        ("--mem-fr", "mem_fraction_static"),
        ("--max-total-token", "max_total_tokens"),
        ("--context-len", "context_length"),
        ("--chunked", "chunked_prefill_size"),
        ("--schedule-heuristic", "schedule_policy"),
    ],
)
def test_short_forms_that_documents_use_stay_unambiguous(typed, key):
    option = OPTIONS.by_name[OPTIONS.complete(typed)]
    assert option.key == key


def test_a_beginning_of_several_names_is_refused_with_all_of_them():
    message = refusal("--max-", "3")
    assert "--max-total-tokens" in message
    assert "--max-running-requests" in message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prot", "3"], "there is no option --prot; did you mean --port?"),
        (["--xyzzy"], "there is no option --xyzzy; --help lists them all"),
        (["port", "3"], "unexpected argument 'port': options start with --"),
        (["--"], "there is no option --; --help lists them all"),
        (["--port"], "--port needs a value: --port VALUE"),
        (["--port", "--tp", "2"], "--port needs a value: --port VALUE"),
        (["--port", "many"], "--port takes a whole number, got 'many'"),
        (["--port", "70000"], "--port must be from 1 to 65535, got 70000"),
        (["--mem-fraction-static", "nan"], "--mem-fraction-static must be from 0.01 to 0.99"),
        (["--stream-interval", "0"], "--stream-interval must be at least 1, got 0"),
        (["--chunked-prefill-size", "0"], "--chunked-prefill-size must be positive, or -1, got 0"),
        (["--log-requests=yes"], "--log-requests takes no value, got 'yes'"),
        (["--dtype", "int8"], "--dtype must be one of auto, float16, bfloat16, float32"),
        (["--load-format", "pt"], "--load-format pt: such checkpoints are unpickled"),
        (["--device", "xpu"], "--device xpu: this release runs on NVIDIA GPUs and CPUs"),
        (["--api-key", ""], "--api-key is empty"),
        (["--json-model-override-args", "{"], "--json-model-override-args is not JSON"),
        (["--json-model-override-args", "[1]"], "must be a JSON object, got [1]"),
        (["--skip-tokenizer-init", "--chat-template", "chatml"], "leave out one of"),
        (["--skip-tokenizer-init", "--reasoning-parser", "qwen3"], "leave out one of"),
        (["--reasoning-parser", "gpt"], "must be one of deepseek-r1, qwen3"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml cannot be read"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere cannot be read"),
    ],
)
def test_a_mistake_is_answered_with_what_to_change(argv, said):
    assert said in refusal(*argv)


def test_values_follow_a_blank_or_an_equals_sign_and_may_be_negative():
    config = ServerConfig.from_argv(
        ["--port=31000", "--chunked-prefill-size", "-1", "--dtype=half"]
    )
    assert (config.port, config.chunked_prefill_size, config.dtype) == (31000, -1, "float16")


def test_flashinfer_runs_where_it_is_asked_for_and_samples_nowhere():
    assert ServerConfig().attention_backend == "auto"
    config = ServerConfig.from_argv(["--attention-backend", "flashinfer", "--disable-flashinfer"])
    assert config.attention_backend == "flashinfer"
    assert "use pytorch" in refusal("--sampling-backend", "flashinfer")


REFUSED_NAMES = [(row, name) for row in REFUSED for name in row.names]


@pytest.mark.parametrize(("row", "name"), REFUSED_NAMES, ids=[name for _, name in REFUSED_NAMES])
def test_a_refused_option_says_why(row: Refused, name: str):
    words = [] if row.takes == "nothing" else ["something"]
    assert refusal(name, *words) == f"{name}: {row.why}"
    keyword = name.removeprefix("--").replace("-", "_")
    with pytest.raises(ConfigError, match=re.escape(f"{name}: {row.why}")):
        ServerConfig.from_kwargs(**{keyword: True if row.takes == "nothing" else "something"})
    assert ServerConfig.from_kwargs(**{keyword: None}) == ServerConfig()


def test_harmless_values_of_refused_options_are_let_through():
    for row in REFUSED:
        for name in row.names:
            for value in row.harmless:
                assert ServerConfig.from_argv([name, value]) == ServerConfig()
    assert ServerConfig.from_kwargs(dp_size=1, lora_paths=[], is_embedding=False) == ServerConfig()


def test_vectors_are_asked_for_by_the_flag_of_sglang():
    assert ServerConfig.from_argv(["--is-embedding"]).is_embedding
    assert not ServerConfig().is_embedding


def test_accepted_options_change_nothing():
    for row in ACCEPTED:
        for name in row.names:
            words = [] if row.takes == "nothing" else ["30004", "30005"]
            assert ServerConfig.from_argv([name, *words]) == ServerConfig()


def test_command_lines_of_the_sglang_documents_start():
    argv = "--model-path meta-llama/Meta-Llama-3-8B-Instruct --port 30000 --tp 2 --enable-p2p-check"
    argv += " --mem-fraction-static 0.7 --disable-flashinfer --attention-backend torch_native"
    argv += " --enable-overlap-scheduler --disable-cuda-graph --chunked-prefill-size 4096 --dp 1"
    config = ServerConfig.from_argv(argv.split())
    assert (config.tp_size, config.mem_fraction_static) == (2, 0.7)
    assert config.model_name == "meta-llama/Meta-Llama-3-8B-Instruct"


def test_keywords_are_flags_with_underscores():
    config = ServerConfig.from_kwargs(
        model_path=Path("/m"), tp=2, mem_fraction_static=0.5, drain_timeout=3
    )
    assert (config.model_path, config.tp_size, config.drain_timeout) == ("/m", 2, 3.0)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"model_pth": "x"}, "there is no option 'model_pth'; did you mean --model-path?"),
        ({"port": "30000"}, "--port takes a whole number, got '30000'"),
        ({"port": True}, "--port takes a whole number, got True"),
        ({"port": None}, "--port takes a whole number, got None"),
        ({"log_requests": 1}, "--log-requests takes true or false, got 1"),
        ({"model_path": ["a"]}, "--model-path takes a text, got ['a']"),
    ],
)
def test_wrong_keywords_are_answered_with_what_to_change(keywords, said):
    with pytest.raises(ConfigError) as caught:
        ServerConfig.from_kwargs(**keywords)
    assert str(caught.value) == said


def test_the_command_line_wins_over_the_file_and_the_file_over_the_environment(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("SGLANG_API_KEY", "from the environment")
    file = tmp_path / "server.yaml"
    file.write_text("port: 31000\ntp-size: 2\napi_key: from the file\nlog_requests: true\n")
    config = ServerConfig.from_argv(["--config", str(file), "--port", "32000"])
    assert (config.port, config.tp_size, config.api_key) == (32000, 2, "from the file")
    assert config.log_requests


def test_a_config_file_may_be_json_and_must_hold_known_flags(tmp_path):
    file = tmp_path / "server.json"
    file.write_text(json.dumps({"port": 31000}))
    assert ServerConfig.from_argv(["--config", str(file)]).port == 31000
    file.write_text(json.dumps({"prot": 31000}))
    assert "did you mean --port?" in refusal("--config", str(file))
    file.write_text("- port")
    assert "must hold flags as keys" in refusal("--config", str(file))
    file.write_text("{port: ")
    assert "neither YAML nor JSON" in refusal("--config", str(file))


def test_our_environment_variable_wins_over_the_old_one(monkeypatch):
    monkeypatch.setenv("SGLANG_API_KEY", "old")
    assert ServerConfig.from_argv([]).api_key == "old"
    monkeypatch.setenv("SGL_API_KEY", "new")
    assert ServerConfig.from_argv([]).api_key == "new"
    assert ServerConfig.from_argv(["--api-key", "typed"]).api_key == "typed"


@pytest.mark.parametrize("name", ["api-key", "admin-api-key"])
def test_a_key_file_holds_the_key(name, tmp_path, monkeypatch):
    field = name.replace("-", "_")
    monkeypatch.setenv(f"SGL_{field.upper()}", "from the environment")
    assert getattr(ServerConfig.from_argv([]), field) == "from the environment"
    file = tmp_path / "key"
    file.write_text("secret\n")
    config = ServerConfig.from_argv([f"--{name}-file", str(file)])
    assert getattr(config, field) == "secret"
    assert "leave out one" in refusal(f"--{name}-file", str(file), f"--{name}", "other")
    file.write_text("\n")
    assert f"--{name} is empty" in refusal(f"--{name}-file", str(file))


def test_secrets_are_neither_shown_nor_published():
    config = ServerConfig(api_key="hush", admin_api_key="hush")
    assert "hush" not in repr(config)
    assert "hush" not in json.dumps(config.public_values())
    assert config.public_values()["port"] == 30000


def test_limits_follow_the_device_and_what_was_typed():
    on_cpu = ServerConfig().limits_on("cpu", num_cores=4)
    assert (on_cpu.max_step_tokens, on_cpu.num_cpu_threads) == (512, 4)
    on_cuda = ServerConfig(tp_size=4).limits_on("cuda", num_cores=64)
    assert (on_cuda.max_step_tokens, on_cuda.mem_fraction_static) == (8192, 0.97)
    assert (on_cuda.max_total_tokens, on_cuda.num_cpu_threads) == (None, 16)
    typed = ServerConfig(max_total_tokens=99, mem_fraction_static=0.3, max_running_requests=7)
    limits = typed.limits_on("cuda", num_cores=1)
    assert (limits.max_total_tokens, limits.mem_fraction_static) == (99, 0.3)
    assert limits.max_running_requests == 7


@pytest.mark.parametrize(
    ("chunk", "most", "expected"), [(-1, 16384, 16384), (4096, 16384, 4096), (4096, 1024, 1024)]
)
def test_a_step_holds_at_most_what_both_prefill_flags_allow(chunk, most, expected):
    config = ServerConfig(chunked_prefill_size=chunk, max_prefill_tokens=most)
    assert config.limits_on("cuda", num_cores=1).max_step_tokens == expected


def test_every_group_begins_with_a_field_and_every_default_passes_its_own_check():
    keys = [each.name for each in dataclasses.fields(ServerConfig)]
    assert [key for key in keys if key in GROUPS.values()] == list(GROUPS.values())
    assert keys[0] in GROUPS.values()
    for option in FIELD_OPTIONS:
        option.check(option.default)


def test_names_of_vllm_are_told_what_they_are_called_here():
    known = OPTIONS.by_name
    for name, told in OF_VLLM.items():
        with pytest.raises(ConfigError, match=f"there is no option {name}: ") as refused:
            ServerConfig.from_argv([name, "1"])
        assert all(word in known for word in re.findall(r"--[a-z-]+", told)), str(refused.value)


def test_what_is_refused_is_not_suggested():
    with pytest.raises(ConfigError) as refused:
        ServerConfig.from_argv(["--enable-custom-logit-processors"])
    assert "did you mean --enable-custom" not in str(refused.value)
