"""`sgl bench serving` as a command: its flags, what it asks a server, what it prints and writes."""

from __future__ import annotations

import json
import math
import sys

import pytest
from fake_llm import NUM_PROMPT, FakeLlm, Script, running, well_behaved

from sgl import bench_serving, cli
from sgl.bench import discovery
from sgl.bench.settings import ServingConfig
from sgl.errors import ConfigError
from sgl.model_files import demo_model_path

SMALL = ["--num-prompts", "4", "--random-input-len", "6", "--random-output-len", "3"]


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("SGL_API_KEY", raising=False)
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)


@pytest.fixture
def fake():
    with running(FakeLlm(well_behaved)) as server:
        yield server


def bench(fake: FakeLlm, *argv: str) -> int:
    return bench_serving.main(["--base-url", fake.url, *argv])


# flags


def test_names_of_sglang_and_their_beginnings_are_understood():
    argv = ["--backend", "sglang-native", "--num-prompt", "10", "--random-input", "9"]
    argv += ["--request-rate", "2", "4.5", "inf", "--host=10.0.0.1"]
    config = ServingConfig.from_argv(argv)
    assert (config.backend, config.num_prompts, config.random_input_len) == ("sgl", 10, 9)
    assert config.request_rate == (2.0, 4.5, math.inf)
    assert config.url == "http://10.0.0.1:30000"


def test_the_address_follows_from_the_backend_or_is_given():
    assert ServingConfig(backend="vllm").url == "http://127.0.0.1:8000"
    assert ServingConfig(base_url="https://host/v1/").url == "https://host"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--backend", "trt"], "--backend must be one of sgl, sgl-oai"),
        (["--base-url", "localhost:1"], "must look like http://HOST:PORT"),
        (["--base-url", "http://h:1", "--port", "2"], "leave out --port"),
        (["--request-rate", "0"], "--request-rate must be positive"),
        (["--request-rate", "2", "fast"], "--request-rate takes a number, got 'fast'"),
        (["--request-rate"], "--request-rate needs a value"),
        (["--extra-request-body", "{"], "--extra-request-body is not JSON"),
        (["--extra-request-body", "[]"], "must be a JSON object, got []"),
        (["--goodput", "ttft=3"], "takes METRIC:MS such as ttft:1000, got 'ttft=3'"),
        (["--goodput", "speed:3"], "the metrics are ttft, itl, tpot, e2e"),
        (["--goodput", "ttft:3", "--disable-stream"], "only e2e can be measured"),
        (["--plot", "a.png"], "--plot draws SVG"),
        (["--output-details"], "--output-details adds to the --output-file"),
        (["--dataset-name", "file"], "--dataset-name file needs --dataset-path"),
        (["--dataset-path", "x"], "--dataset-name random reads no --dataset-path"),
        (["--json-schema-mode", "json_schema"], "needs --dataset-name json"),
        (
            ["--dataset-name", "json", "--json-schema-mode", "response_format"],
            "/generate has no response_format",
        ),
        (["--backend", "vllm-chat", "--apply-chat-template"], "the server does that"),
        (["--backend", "vllm-chat", "--prompt-format", "ids"], "takes text only"),
        (["--dataset-name", "multi-turn", "--prompt-format", "ids"], "a turn of multi-turn"),
        (
            ["--dataset-name", "generated-shared-prefix", "--num-prompts", "1025"],
            "64 groups of 16 prompts are 1024; raise --gsp-num-groups",
        ),
    ],
)
def test_a_mistake_is_answered_with_what_to_change(argv, said):
    with pytest.raises(ConfigError) as caught:
        ServingConfig.from_argv(argv)
    assert said in str(caught.value)


def test_both_commands_are_the_same(fake, capsys):
    assert cli.main(["bench", "serving", "--base-url", fake.url, *SMALL]) == 0
    assert "4 done" in capsys.readouterr().out
    assert cli.main(["bench", "serving", "--help"]) == 0
    assert "--gsp-num-groups N" in capsys.readouterr().out


# runs


def test_a_run_sends_a_warm_up_and_then_what_was_asked_for(fake, capsys):
    assert bench(fake, *SMALL, "--random-range-ratio", "1") == 0
    printed = capsys.readouterr()
    assert "requests 4 done" in " ".join(printed.out.split())
    assert f"({4 * NUM_PROMPT} in all, 43% of them from the cache)" in printed.out
    assert "(12 in all)" in printed.out
    assert printed.err == "", "no bar where stderr is not a terminal"
    prompts = [tuple(body["input_ids"]) for _, body in fake.seen]
    assert [len(prompt) for prompt in prompts] == [6] * 5
    assert len(set(prompts)) == 5, "the warm-up must not put a prompt into the cache"


def test_the_same_seed_sends_the_same(fake):
    for seed in ("3", "3", "4"):
        assert bench(fake, *SMALL, "--seed", seed, "--warmup-requests", "0") == 0
    sent = [sorted(str(body) for _, body in fake.seen[i : i + 4]) for i in (0, 4, 8)]
    assert sent[0] == sent[1]
    assert sent[0] != sent[2]


@pytest.mark.parametrize(
    ("backend", "path", "kind"),
    [
        ("sgl", "/generate", list),
        ("vllm", "/v1/completions", list),
        ("lmdeploy", "/v1/completions", str),
        ("openai-chat", "/v1/chat/completions", str),
    ],
)
def test_random_prompts_are_ids_where_the_backend_takes_them(fake, backend, path, kind):
    assert bench(fake, *SMALL, "--backend", backend, "--vocab-size", "1000") == 0
    assert {seen for seen, _ in fake.seen} == {path}
    for _, body in fake.seen:
        prompt = body.get("input_ids") or body.get("prompt") or body["messages"][0]["content"]
        assert type(prompt) is kind
        if kind is list:
            assert 100 <= min(prompt) <= max(prompt) < 900
        else:
            assert len(prompt.split()) <= 6
        assert body.get("model", "fake-model") == "fake-model"


def test_every_flag_of_a_request_reaches_it(fake):
    argv = ["--api-key", "k", "--model", "other", "--backend", "sgl-oai", "--disable-stream"]
    argv += ["--disable-ignore-eos", "--extra-request-body", '{"top_p": 0.5}']
    assert bench(fake, *SMALL, *argv) == 0
    body = fake.seen[-1][1]
    assert (body["model"], body["stream"], body["ignore_eos"]) == ("other", False, False)
    assert body["top_p"] == 0.5
    assert fake.headers[-1]["Authorization"] == "Bearer k"


def test_a_template_or_ids_are_made_by_the_tokenizer(fake):
    argv = ["--dataset-name", "json", "--num-prompts", "2", "--tokenizer", demo_model_path()]
    assert bench(fake, *argv, "--apply-chat-template") == 0
    assert all("<|im_start|>user\n" in body["text"] for _, body in fake.seen)
    assert bench(fake, *argv, "--prompt-format", "ids") == 0
    assert all(len(body["input_ids"]) > 20 for _, body in fake.seen[3:])


def test_the_tokenizer_of_the_server_is_found_when_its_files_are_here(fake, capsys):
    fake.info = {"tokenizer_path": demo_model_path()}
    assert bench(fake, *SMALL, "--prompt-format", "text", "--apply-chat-template") == 0
    fake.info = {"tokenizer_path": "/not/on/this/machine"}
    assert bench(fake, *SMALL, "--apply-chat-template") == 2
    assert "--apply-chat-template needs a tokenizer: give --tokenizer" in capsys.readouterr().err


def test_conversations_hold_the_answers_of_the_server(fake):
    argv = ["--dataset-name", "multi-turn", "--num-prompts", "1", "--multi-turn-num-turns", "2"]
    assert bench(fake, *argv, "--multi-turn-output-len", "3", "--backend", "openai-chat") == 0
    messages = fake.seen[-1][1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "aaa"


def test_several_rates_are_run_compared_recorded_and_drawn(fake, tmp_path, capsys):
    lines, picture = tmp_path / "runs.jsonl", tmp_path / "rates.svg"
    argv = ["--request-rate", "200", "400", "inf", "--output-file", str(lines), "--output-details"]
    assert bench(fake, *SMALL, *argv, "--plot", str(picture)) == 0
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["request_rate"] for record in records] == [200, 400, "inf"]
    assert [len(record["requests"]) for record in records] == [4, 4, 4]
    assert {len(each["chunks"]) for each in records[0]["requests"]} <= {1, 2, 3}
    assert picture.read_text().startswith("<svg ")
    assert f"wrote {picture}" in capsys.readouterr().out
    prompts = [tuple(body["input_ids"]) for _, body in fake.seen]
    assert len(set(prompts)) == len(prompts), "a later run must not find its prompts cached"


def test_failures_are_counted_shown_and_do_not_end_the_run(fake, capsys):
    def fail_often(path, body):
        if len(fake.seen) % 2:
            return well_behaved(path, body)
        return Script([b'{"error": {"message": "the queue is full"}}'], status=503)

    fake.answer = fail_often
    assert bench(fake, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "2 done, 2 FAILED" in printed
    assert "2 x status 503: the queue is full" in printed


def test_when_nothing_is_answered_the_exit_code_says_so(fake):
    fake.answer = lambda path, body: Script([], status=500)
    assert bench(fake, *SMALL, "--warmup-requests", "0") == 1


def test_a_failing_warm_up_stops_before_the_load(fake, capsys):
    fake.answer = lambda path, body: Script([b"no such model"], status=404)
    assert bench(fake, *SMALL) == 2
    assert "fails the warm-up request, so nothing was measured: status 404: no such model" in (
        capsys.readouterr().err
    )
    assert len(fake.seen) == 1


def test_the_limit_on_concurrency_holds_on_the_wire(fake):
    assert bench(fake, "--num-prompts", "12", *SMALL[2:], "--max-concurrency", "3") == 0
    assert fake.peak == 3


def test_the_cache_is_flushed_once_the_server_is_idle(fake, monkeypatch, capsys):
    monkeypatch.setattr(discovery, "POLL_S", 0.01)
    fake.flushes = [400, 400, 200]
    assert bench(fake, *SMALL, "--flush-cache") == 0
    assert fake.flushes == []
    assert bench(fake, *SMALL, "--flush-cache") == 2
    assert "--flush-cache: the server does not flush its cache (" in capsys.readouterr().err


def test_a_server_that_is_loading_is_waited_for(fake, monkeypatch):
    monkeypatch.setattr(discovery, "POLL_S", 0.01)
    fake.not_ready = 3
    assert bench(fake, *SMALL) == 0


def test_a_server_that_never_gets_ready_is_named(fake, capsys):
    fake.not_ready = 1000
    assert bench(fake, *SMALL, "--ready-timeout", "0") == 2
    assert "is not ready after 0 s (/health: status 503): start a server with `sgl serve`" in (
        capsys.readouterr().err
    )
    argv = ["--base-url", "http://127.0.0.1:1", "--ready-timeout", "0"]
    assert bench_serving.main(argv) == 2
    assert "http://127.0.0.1:1 is not ready" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_noticed_before_the_run(fake, capsys):
    assert bench(fake, *SMALL, "--output-file", "/nowhere/runs.jsonl") == 2
    assert "/nowhere/runs.jsonl cannot be written" in capsys.readouterr().err
    assert fake.seen == []


def test_a_terminal_gets_a_progress_bar_unless_it_wants_none(fake, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert bench(fake, *SMALL) == 0
    assert "0/4" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert bench(fake, *SMALL, "--disable-tqdm") == 0
    assert capsys.readouterr().err == ""
