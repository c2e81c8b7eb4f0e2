"""The benchmarks without HTTP: their flags, and what is made of the times they take."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from sgl import bench_latency, bench_offline_throughput
from sgl.bench.prompts import Turn
from sgl.errors import ConfigError
from sgl.offline import latency, runs, throughput
from sgl.offline.latency import Latency, Shape
from sgl.offline.settings import LatencyConfig, ThroughputConfig, parse
from sgl.offline.throughput import Throughput


def test_own_flags_and_those_of_the_server_are_told_apart():
    argv = "--model-path X --tp 2 --batch 1 4 --input-len 32 --output 8 16 --load-format dummy"
    config, server = parse(LatencyConfig, argv.split())
    assert config == LatencyConfig(batch_size=(1, 4), input_len=(32,), output_len=(8, 16))
    assert (server.model_path, server.tp_size, server.load_format) == ("X", 2, "dummy")
    assert server.log_level == "warning"


def test_the_server_may_be_described_in_a_file(tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text("page-size: 16\ntp-size: 4\n")
    _, server = parse(ThroughputConfig, ["--config", str(path), "--tp", "2", "--log-level", "info"])
    assert (server.page_size, server.tp_size, server.log_level) == (16, 2, "info")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--batch-size many", "--batch-size takes a whole number, got 'many'"),
        ("--batch-sise 1", "did you mean --batch-size?"),
        ("--quantization fp8", "not in this release"),
        ("--profile-folder /tmp", "--profile-folder is where --profile writes: give both"),
        ("--result-filename /nowhere/x", "/nowhere/x cannot be written: No such file"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(argv, reason):
    with pytest.raises(ConfigError) as caught:
        parse(LatencyConfig, argv.split())
    assert reason in str(caught.value)


def test_a_throughput_run_has_the_datasets_of_the_client():
    argv = "--dataset-name generated-shared-prefix --gsp-num-groups 3 --num-prompts 5 --seed 7"
    config, _ = parse(ThroughputConfig, argv.split())
    dataset = config.dataset()
    assert (dataset.dataset_name, dataset.gsp_num_groups) == ("generated-shared-prefix", 3)
    assert (dataset.num_prompts, dataset.seed, dataset.makes_ids) == (5, 7, True)
    with pytest.raises(ConfigError, match="--dataset-name must be one of random"):
        parse(ThroughputConfig, ["--dataset-name", "json"])


def test_the_same_seed_gives_the_same_requests():
    argv = "--num-prompts 4 --random-input-len 9 --random-output-len 5 --random-range-ratio 1"
    config, server = parse(ThroughputConfig, [*argv.split(), "--skip-tokenizer-init"])
    turns = throughput.requests(config, server)
    assert [(len(turn.content), turn.output_len) for turn in turns] == [(9, 5)] * 4
    assert all(isinstance(each, int) for turn in turns for each in turn.content)
    assert throughput.requests(config, server) == turns


def step(arrived, num_rows, num_prefill_tokens=0):
    return {"arrived": arrived, "num_rows": num_rows, "num_prefill_tokens": num_prefill_tokens}


# two prompts in two chunks; the first decodes while the second is computed, and ends first
TRACE = [step(10.5, 1, 8), step(11, 2, 4), step(11.1, 2), step(11.4, 2), step(11.5, 1)]


def test_prefill_ends_with_the_last_first_token_and_steps_are_those_of_the_whole_batch():
    result = Latency.of(Shape(2, 6, 4), 10.0, 12.0, TRACE)
    assert result.prefill == 1.0
    assert result.steps == pytest.approx((0.1, 0.3))
    assert result.values() == pytest.approx(
        {
            "batch_size": 2,
            "input_len": 6,
            "output_len": 4,
            "prefill_latency": 1.0,
            "prefill_throughput": 12.0,
            "median_decode_latency": 0.2,
            "p99_decode_latency": 0.298,
            "median_decode_throughput": 10.0,
            "total_latency": 2.0,
            "overall_throughput": 10.0,
        }
    )


def test_one_token_a_prompt_has_no_decode_steps():
    result = Latency.of(Shape(1, 6, 1), 10.0, 12.0, [step(11, 1, 6)])
    assert result.values()["median_decode_latency"] is None
    row = latency.table([result]).splitlines()[2].split()
    assert row == ["1", "6", "1", "│", "1000.00", "6", "│", "-", "-", "-", "│", "2.000", "4"]


def test_throughput_counts_what_the_answers_say():
    meta = {"prompt_tokens": 30, "completion_tokens": 10, "cached_tokens": 15}
    result = Throughput.of(2.0, [{"meta_info": meta}] * 4)
    rows = [line.split() for line in result.table().splitlines()]
    assert rows == [
        ["requests", "4", "2.00", "a", "second"],
        ["input", "tokens", "120", "60", "a", "second"],
        ["output", "tokens", "40", "20", "a", "second"],
        ["tokens", "160", "80", "a", "second"],
        ["seconds", "2.00"],
        ["cached", "50.0%", "of", "the", "input", "tokens"],
    ]


@pytest.mark.parametrize(
    ("contents", "asked"),
    [
        (["a b", "c"], (["a b", "c"], None)),
        ([[5, 6], [7]], (None, [[5, 6], [7]])),
    ],
)
def test_requests_go_to_the_engine_as_they_are_with_lengths_of_their_own(contents, asked):
    calls = []

    def generate(prompt, sampling, *, input_ids):
        calls.append((prompt, input_ids, sampling))
        meta = {"prompt_tokens": 2, "completion_tokens": 1, "cached_tokens": 0}
        return [{"meta_info": meta}] * 2

    turns = [
        Turn(content, output_len) for content, output_len in zip(contents, (3, 4), strict=True)
    ]
    engine = SimpleNamespace(generate=generate)
    result = throughput.answer(engine, turns, ignores_eos=False)
    assert (result.num_requests, result.num_input, result.num_output) == (2, 4, 2)
    [(prompts, ids, sampling)] = calls
    assert (prompts, ids) == asked
    assert [each["max_new_tokens"] for each in sampling] == [3, 4]
    assert not any(each["ignore_eos"] for each in sampling)


def test_a_batch_must_be_able_to_run_at_once():
    config = ["--device", "cpu", "--max-running-requests", "2", "--batch-size", "3"]
    with pytest.raises(ConfigError, match="--batch-size 3 is more than --max-running-requests 2"):
        latency.run(config)
    engine = SimpleNamespace(get_server_info=lambda: {"max_total_num_tokens": 99})
    with pytest.raises(ConfigError, match="a KV cache of 100 tokens, there is room for 99"):
        latency._check_room(engine, [Shape(1, 2, 3), Shape(10, 6, 4)])


def test_results_are_appended(tmp_path):
    path = tmp_path / "results.jsonl"
    argv = ["--result-filename", str(path), "--run-name", "mine", "--device", "cpu"]
    config, server = parse(LatencyConfig, argv)
    for value in (1.5, None):
        runs.write_result(config, server, {"median_decode_latency": value})
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["run_name"], first["device"], first["tp_size"]) == ("mine", "cpu", 1)
    assert (first["median_decode_latency"], second["median_decode_latency"]) == (1.5, None)


@pytest.mark.parametrize(
    ("module", "flag"), [(bench_latency, "--batch-size"), (bench_offline_throughput, "--gsp-")]
)
def test_they_are_programs_of_their_own(module, flag, capsys):
    assert module.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert flag in printed
    assert "sgl serve --help" in printed
