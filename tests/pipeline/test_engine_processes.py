"""The processes of an `sgl.Engine` live exactly as long as the engine, however its script ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pipeline.server import ROOT, processes_of_session, wait_until
from toy import toy_settings

GONE_AFTER_S = 3.0
NUM_ACTORS = 3  # worker, scheduler, detokenizer


@contextmanager
def script(folder: Path, *lines: str) -> Iterator[subprocess.Popen[str]]:
    """A program that uses engines, without any guard; `generate` tells how many tokens came."""
    path = folder / "script.py"
    settings = toy_settings(folder / "toy") | {"num_cpu_threads": 1}
    path.write_text(
        "\n".join(
            [
                "import os, sgl, sys, threading",
                f"settings = {settings!r}",
                "def say(*values): print(*values, flush=True)",
                "def num_descriptors(): return len(os.listdir('/proc/self/fd'))",
                "def generate(engine):",
                "    sampling = {'max_new_tokens': 5, 'ignore_eos': True}",
                "    return len(engine.generate('Once', sampling)['output_ids'])",
                *lines,
            ]
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            for pid in processes_of_session(process.pid):
                os.kill(pid, signal.SIGKILL)


def read(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


def num_children(process: subprocess.Popen[str]) -> int:
    return len(processes_of_session(process.pid).keys() - {process.pid})


def is_gone(process: subprocess.Popen[str]) -> bool:
    return process.poll() is not None and not processes_of_session(process.pid)


def test_script_without_a_guard_may_forget_to_shut_down(tmp_path: Path) -> None:
    with script(tmp_path, "say(generate(sgl.Engine(**settings)))") as process:
        assert read(process) == "5"
        assert wait_until(lambda: is_gone(process), GONE_AFTER_S)
        assert process.returncode == 0


def test_two_engines_live_side_by_side_and_end_one_by_one(tmp_path: Path) -> None:
    with script(
        tmp_path,
        "first, second = sgl.Engine(**settings), sgl.Engine(**settings)",
        "say(generate(first), generate(second))",
        "sys.stdin.readline()",
        "first.shutdown()",
        "say(generate(second))",
        "sys.stdin.readline()",
        "second.shutdown()",
        "say('down')",
        "sys.stdin.readline()",
    ) as process:
        assert read(process) == "5 5"
        assert num_children(process) == 2 * NUM_ACTORS
        print(file=process.stdin, flush=True)
        assert read(process) == "5"
        assert num_children(process) == NUM_ACTORS
        print(file=process.stdin, flush=True)
        assert read(process) == "down"
        assert num_children(process) == 0


def test_engine_gives_back_its_descriptors(tmp_path: Path) -> None:
    with script(
        tmp_path,
        "for _ in range(2):",
        "    engine = sgl.Engine(**settings)",
        "    generate(engine)",
        "    engine.shutdown()",
        "    say(num_descriptors())",
    ) as process:
        assert read(process) == read(process)


def test_engine_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    with script(
        tmp_path,
        "engines = []",
        "thread = threading.Thread(target=lambda: engines.append(sgl.Engine(**settings)))",
        "thread.start()",
        "thread.join()",
        "say(generate(engines[0]))",
        "raise SystemExit(3)",
    ) as process:
        assert read(process) == "5"
        assert wait_until(lambda: is_gone(process), GONE_AFTER_S)
        assert process.returncode == 3


def test_script_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    with script(
        tmp_path,
        "engine = sgl.Engine(**settings)",
        "say(generate(engine))",
        "sys.stdin.readline()",
    ) as process:
        assert read(process) == "5"
        assert num_children(process) == NUM_ACTORS
        process.kill()
        assert wait_until(lambda: is_gone(process), GONE_AFTER_S)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "the worker0 process ended unexpectedly (SIGKILL)"),
        (signal.SIGSTOP, "worker0 made no progress for 3 s"),
    ],
    ids=["killed", "stopped"],
)
def test_caller_is_told_when_the_engine_dies(
    number: signal.Signals, reason: str, tmp_path: Path
) -> None:
    with script(
        tmp_path,
        "engine = sgl.Engine(**settings, watchdog_timeout=3)",
        "say(generate(engine))",
        "try:",
        "    engine.generate('Once', {'max_new_tokens': 2000, 'ignore_eos': True})",
        "except Exception as error:",
        "    say(type(error).__name__, error)",
        "sys.stdin.readline()",
    ) as process:
        assert read(process) == "5"
        pids = {title: pid for pid, title in processes_of_session(process.pid).items()}
        os.kill(pids["sgl::worker0"], number)
        assert reason in read(process)
        assert wait_until(lambda: num_children(process) == 0, GONE_AFTER_S)


def test_whoever_waits_for_an_engine_that_is_shut_down_hears_of_it(tmp_path: Path) -> None:
    lines = [
        "engine = sgl.Engine(**settings)",
        "endless = {'max_new_tokens': 1_500, 'ignore_eos': True}",
        "def ask(work):",
        "    try: work()",
        "    except sgl.errors.EngineError as error: say(error)",
        "works = [",
        "    lambda: engine.generate('Once', endless),",
        "    lambda: list(engine.generate('Once', endless, stream=True)),",
        "    sgl.function(lambda s: s.__iadd__('Once' + sgl.gen('x', **{",
        "        'max_tokens': 1_500, 'ignore_eos': True}))['x']).run,",
        "]",
        "threads = [threading.Thread(target=ask, args=[work]) for work in works]",
        "sgl.set_default_backend(engine)",
        "for thread in threads: thread.start()",
        "while engine.get_server_info()['num_running_reqs'] < 3: pass",
        "engine.shutdown()",
        "for thread in threads: thread.join()",
        "ask(works[0])",
    ]
    with script(tmp_path, *lines) as process:
        assert process.stdout.read().splitlines() == ["the engine was shut down"] * 4
