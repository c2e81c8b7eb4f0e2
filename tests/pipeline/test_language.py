"""Programs against SmolLM2: over HTTP and in this process, and what `select` is worth."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from fake_backend import wait_until
from pipeline.server import ROOT, Server
from pipeline.server import wait_until as server_wait_until
from programs import CHARACTER, PROGRAMS, outcome

import sgl
from sgl.errors import BackendError, ConfigError
from sgl.lang.backends.engine import backend_of
from sgl.utils import http_request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FLAGS = ["--dtype", "float32", "--num-cpu-threads", "1"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(FLAGS, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def endpoint(server: Server) -> sgl.RuntimeEndpoint:
    return sgl.RuntimeEndpoint(f"http://127.0.0.1:{server.port}")


def test_roles_are_written_as_the_models_own_template_writes_them(endpoint):
    state = PROGRAMS["role_scopes"][0].run(backend=endpoint, temperature=0)
    assert state.text().startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQuestion: What is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nAnswer: "
    )


@pytest.fixture(scope="module")
def runtime() -> Iterator[sgl.Runtime]:
    with sgl.Runtime(dtype="float32", num_cpu_threads=1) as runtime:
        yield runtime


def test_programs_come_to_the_same_on_every_way_to_the_runtime(endpoint, runtime):
    def run_all(backend: Any) -> dict[str, Any]:
        states = {
            name: program.run(backend=backend, temperature=0, **arguments)
            for name, (program, arguments) in PROGRAMS.items()
        }
        return {name: outcome(state) for name, state in states.items()}

    over_http = run_all(endpoint)
    with sgl.Engine(dtype="float32", num_cpu_threads=1) as engine:
        in_process = run_all(engine)
    of_its_own = run_all(runtime)
    assert len(PROGRAMS) == 30
    for name in PROGRAMS:
        assert over_http[name] == in_process[name] == of_its_own[name], name
    variables = {name: found["variables"] for name, found in over_http.items()}
    assert "Berlin" in variables["multi_turn"]["capital"]
    assert "Paris" in variables["text_qa"]["answer"]
    assert re.fullmatch(r"\d{1,2}\/\d{1,2}\/\d{2,4}", variables["birth_date"]["answer"])
    assert re.fullmatch(CHARACTER, variables["character"]["json_output"])
    assert len(variables["parallel_sample"]["answer"]) == 3
    assert json.loads(variables["schema"]["json"])["city"] in ("Paris", "Rome")
    assert int(variables["types"]["number"])
    assert len(variables["nested_forks"]["more"]) == 2


def test_a_batch_is_answered_in_order_and_begins_with_what_is_shared(endpoint):
    countries = ["Germany", "France", "Italy", "Japan", "Spain"] * 4
    program, _ = PROGRAMS["multi_turn"]
    states = program.run_batch([{"country": c} for c in countries], backend=endpoint, temperature=0)
    capitals = [state["capital"] for state in states]
    assert capitals[:5] == capitals[5:10]
    assert "Berlin" in capitals[0]
    assert "Tokyo" in capitals[3]


def test_every_turn_goes_on_from_the_tokens_of_the_last(endpoint):
    """What was sampled at random may be written in other tokens than its text alone."""

    @sgl.function
    def talk(s):
        for turn in range(6):
            s += sgl.user(f"Tell me more, number {turn}.")
            s += sgl.assistant(sgl.gen(f"said{turn}", max_tokens=24))

    state = talk.run(backend=endpoint, temperature=1.0)
    before = 0
    for turn in range(6):
        meta = state.get_meta_info(f"said{turn}")
        if turn:
            assert meta["cached_tokens"] >= before - 2
        before = meta["prompt_tokens"] + meta["completion_tokens"]


def test_streamed_text_is_the_whole_text(endpoint):
    program, arguments = PROGRAMS["multi_turn"]
    whole = program.run(backend=endpoint, temperature=0, **arguments)
    streamed = program.run(backend=endpoint, temperature=0, stream=True, **arguments)
    pieces = list(streamed.text_iter("building"))
    assert len(pieces) > 3
    assert "".join(pieces) == whole["building"]
    assert streamed.text() == whole.text()


def test_select_is_what_the_model_thinks_of_the_tokens(endpoint):
    """Drawn texts and choices; the scores were computed by transformers."""
    cases = json.loads((ROOT / "tests" / "data" / "smollm2_select.json").read_text("utf-8"))

    @sgl.function
    def choose(s, text, choices):
        s += text + sgl.select("chosen", choices)

    states = choose.run_batch(
        [{"text": case["text"], "choices": case["choices"]} for case in cases], backend=endpoint
    )
    for case, state in zip(cases, states, strict=True):
        wanted = case["scores"]
        found = state.get_meta_info("chosen")["normalized_prompt_logprobs"]
        assert found == pytest.approx(wanted, abs=1e-3), case
        best = sorted(wanted)
        if len(best) == 1 or best[-1] - best[-2] > 1e-3:
            assert state["chosen"] == case["choices"][wanted.index(max(wanted))]


def test_what_the_server_refuses_is_told_at_the_variable(endpoint):
    @sgl.function
    def wrong(s):
        s += "a" + sgl.gen("x", temperature=-1)

    with pytest.raises(BackendError, match="temperature"):
        wrong.run(backend=endpoint)["x"]


def test_nobody_answers_is_an_error_at_once():
    with pytest.raises(BackendError, match=r"127\.0\.0\.1:9 does not answer"):
        sgl.RuntimeEndpoint("http://127.0.0.1:9")


def test_when_a_server_dies_its_programs_end(tmp_path):
    with Server(FLAGS, tmp_path) as server:
        endpoint = sgl.RuntimeEndpoint(f"http://127.0.0.1:{server.port}")

        @sgl.function
        def long(s, n):
            s += f"Story {n}:" + sgl.gen("story", max_tokens=400, ignore_eos=True)
            return s["story"]

        kill = partial(server.signal, "ingress", signal.SIGKILL)
        threading.Timer(1.0, kill).start()
        with pytest.raises(BackendError, match="does not answer"):
            long.run_batch([{"n": n} for n in range(16)], backend=endpoint)


@pytest.mark.parametrize("reads", [True, False])
def test_an_interrupt_ends_a_batch_and_its_requests(server, reads):
    script = (
        "import sgl\n"
        "@sgl.function\n"
        "def long(s, n):\n"
        "    s += f'Story {n}:' + sgl.gen('story', max_tokens=400, ignore_eos=True)\n"
        f"    return s['story'] if {reads} else None\n"
        f"endpoint = sgl.RuntimeEndpoint('http://127.0.0.1:{server.port}')\n"
        "long.run_batch([{'n': n} for n in range(16)], backend=endpoint)\n"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    is_busy = partial(server.gauge, "num_running_reqs")
    assert server_wait_until(is_busy, 20)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=5)
    assert complaint.rstrip().endswith("KeyboardInterrupt")
    assert server_wait_until(lambda: not is_busy(), 5)


def test_the_examples_of_the_tutorial_run(server, tmp_path):
    page = (ROOT / "docs" / "lang" / "tutorial.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    script = tmp_path / "page.py"
    script.write_text(code.replace("127.0.0.1:30000", f"127.0.0.1:{server.port}"), "utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "temperature must be from 0" in done.stdout


def test_the_language_needs_no_torch():
    source = "import sys, sgl; sgl.function; sgl.gen('a'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=True)


def test_an_engine_is_one_backend_for_all_programs():
    with sgl.Engine(dtype="float32", num_cpu_threads=1) as engine:
        assert backend_of(engine) is backend_of(engine)
        how = {"backend": engine, "max_new_tokens": 4, "temperature": 0}
        state = PROGRAMS["text_qa"][0].run("What is 1+1?", **how)
        assert state["answer"]


def test_a_runtime_answers_without_programs_too(runtime):
    params = {"max_new_tokens": 4, "temperature": 0}
    answer = json.loads(runtime.generate("The capital of France is", params))
    assert answer["text"].startswith(" Paris")
    two = json.loads(runtime.generate(["One, two,", "Three, four,"], params, return_logprob=True))
    assert len(two) == 2
    assert len(two[0]["meta_info"]["output_token_logprobs"]) == 4

    async def stream() -> list[str]:
        info = await runtime.get_server_info()
        assert info["dtype"] == "float32"
        pieces = [piece async for piece in runtime.add_request("The capital of France is", params)]
        with pytest.raises(BackendError, match="temperature"):
            await anext(runtime.async_generate("x", {"temperature": -1}))
        return pieces

    pieces = asyncio.run(stream())
    assert len(pieces) > 1
    assert "".join(pieces) == answer["text"]
    runtime.cache_prefix("A long beginning that many prompts share, word by word. ")
    tokenizer = runtime.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Hello there")) == "Hello there"


def test_select_needs_something_to_go_on_from(endpoint):
    """This model has no token that every text begins with."""

    @sgl.function
    def choose(s, before, method):
        s += before + sgl.select("chosen", ["", "é", "日本"], choices_method=method)

    state = choose.run("", sgl.token_length_normalized, backend=endpoint)
    with pytest.raises(BackendError, match="at the beginning of a text"):
        state["chosen"]
    said = "The capital of France is"
    state = choose.run(said, sgl.unconditional_likelihood_normalized, backend=endpoint)
    assert state["chosen"] in ("", "é", "日本")


def test_select_after_a_prompt_of_many_chunks(endpoint):
    @sgl.function
    def choose(s):
        s += "The sky is blue and the grass is green. " * 180
        s += "The sky is" + sgl.select("chosen", [" blue", " a spoon"])

    assert choose.run(backend=endpoint)["chosen"] == " blue"


def test_nothing_can_be_chosen_after_an_answer(endpoint):
    @sgl.function
    def choose(s):
        s += "The capital of France is" + sgl.gen("first", max_tokens=4)
        method = sgl.unconditional_likelihood_normalized
        s += sgl.select("chosen", ["", " not"], choices_method=method)

    assert choose.run(temperature=0, backend=endpoint)["chosen"] in ("", " not")


def test_a_runtime_ends_with_its_program_or_when_it_is_told_to():
    script = (
        "import os, signal, sgl\n"
        "runtime = sgl.Runtime(dtype='float32', num_cpu_threads=1)\n"
        "print(runtime.url, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    url = ended.stdout.strip()
    assert wait_until(lambda: not is_answering(url))


def test_runtimes_that_start_together_do_not_take_each_others_port():
    with ThreadPoolExecutor() as pool:
        starting = [pool.submit(sgl.Runtime, num_cpu_threads=1) for _ in range(2)]
        runtimes = [each.result() for each in starting]
    try:
        assert len({runtime.url for runtime in runtimes}) == 2
    finally:
        for runtime in runtimes:
            runtime.shutdown()


def test_an_interrupt_of_a_program_is_not_for_its_server():
    source = (
        "import os, signal, sgl\n"
        "runtime = sgl.Runtime(dtype='float32', num_cpu_threads=1)\n"
        "try:\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "    signal.pause()\n"
        "except KeyboardInterrupt:\n"
        "    print(runtime.generate('The capital of France is', {'max_new_tokens': 1}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["meta_info"]["completion_tokens"] == 1


def test_a_runtime_that_cannot_start_says_why():
    with pytest.raises(ConfigError, match="model-path"):
        sgl.Runtime(model_pth="typo")
    with pytest.raises(ConfigError, match="exit code"):
        sgl.Runtime(model_path="/nonexistent/model")


def is_answering(url: str) -> bool:
    try:
        return http_request(url + "/health").status_code > 0
    except OSError:
        return False
