"""The benchmarks without HTTP, with an engine that is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from toy import toy_flags

from benchmarks import gpu_idle
from sgl.cli import run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_latency_of_every_shape_a_profile_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, traces = tmp_path / "results.jsonl", tmp_path / "traces"
    own = ["--batch-size", "1", "4", "--input-len", "32", "--output-len", "16", "--profile"]
    own += ["--result-filename", str(results), "--profile-folder", str(traces)]
    assert run_command("bench latency", [*toy_flags(tmp_path / "toy"), *own]) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["batch_size"], line["input_len"]) for line in lines] == [(1, 32), (4, 32)]
    for line in lines:
        assert 0 < line["median_decode_latency"] <= line["p99_decode_latency"]
        assert line["prefill_latency"] < line["total_latency"]
    assert len(list(traces.iterdir())) == 2
    printed = capsys.readouterr()
    assert printed.err.count("Profile of 16 steps written to") == 2
    assert printed.out.splitlines()[4].split()[:3] == ["1", "32", "16"]


def test_offline_throughput_of_shared_prefixes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2"]
    own += ["--gsp-prompts-per-group", "4", "--gsp-system-prompt-len", "60"]
    own += ["--gsp-question-len", "20", "--gsp-output-len", "5"]
    assert run_command("bench offline-throughput", [*toy_flags(tmp_path / "toy"), *own]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["requests", "8"] in [row[:2] for row in rows]
    assert ["input", "tokens", "640"] in [row[:3] for row in rows]
    assert ["output", "tokens", "40"] in [row[:3] for row in rows]
    assert ["cached", "56.2%"] in [row[:2] for row in rows]  # 6 of 8 share 60 of 80


def test_greedy_answers_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*toy_flags(tmp_path / "toy"), "--correctness-test", "--output-len", "3"]
    assert run_command("bench latency", argv) == 0
    printed = capsys.readouterr().out
    assert printed.count("ids: [") == 3
    assert "=== The capital of France is\nThe capital of France is" in printed


def test_what_the_engine_refuses_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*toy_flags(tmp_path / "toy"), "--input-len", "4000"]
    assert run_command("bench latency", argv) == 2
    error = capsys.readouterr().err
    assert "2048" in error
    assert "Traceback" not in error


def test_cpu_time_of_every_process_in_a_decode_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.jsonl"
    argv = ["gpu_idle", "tiny", "--batch", "2", "4", "--output-len", "32", "--out", str(results)]
    monkeypatch.setattr(sys, "argv", [*argv, "--options", '{"device": "cpu"}'])
    gpu_idle.main()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["batch"], line["measured"]) for line in lines] == [(2, "cpu"), (4, "cpu")]
    for line in lines:
        names = ["step", "caller", "detokenizer", "scheduler", "worker0"]
        assert list(line["parts"]) == names
        assert 3 * 28 < line["steps"] < 3 * 34  # 31 a run, more or less as requests arrive
        assert line["parts"]["worker0"]["ms"] > 0
    assert "The idle time of a GPU was left out" in capsys.readouterr().out
