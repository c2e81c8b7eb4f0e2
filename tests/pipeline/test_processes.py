"""A process that dies takes the server with it: at once, and leaving nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from pipeline.server import ACTORS, Server, start_streams, wait_until
from toy import toy_flags

pytestmark = pytest.mark.alone

GONE_AFTER_S = 3.0
GRAMMAR = {"text": "x", "sampling_params": {"regex": "a", "max_new_tokens": 1}}
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT]
CELLS = [
    (name, number)
    for name in ("supervisor", *ACTORS)
    for number in SIGNALS
    if (name, number) != ("supervisor", signal.SIGTERM)  # that is a drain, not a crash
]
SAMPLE = [
    *((name, signal.SIGKILL) for name in ("supervisor", *ACTORS)),
    ("scheduler", signal.SIGTERM),
    ("worker0", signal.SIGSEGV),
]


@pytest.mark.parametrize(("name", "number"), CELLS, ids=lambda part: getattr(part, "name", part))
def test_nothing_is_left_when_a_process_dies(
    name: str, number: signal.Signals, tmp_path: Path, is_full: bool
) -> None:
    if not is_full and (name, number) not in SAMPLE:
        pytest.skip("one of the sample; all with --full")
    with Server(toy_flags(tmp_path / "toy"), tmp_path) as server:
        server.post("/generate", GRAMMAR)
        assert "grammars" in server.pids()
        streams = start_streams(server, 4)
        server.signal(name, number)
        assert wait_until(lambda: not server.leftovers(), GONE_AFTER_S), server.leftovers()
        nobody_can_tell = name in ("supervisor", "ingress")
        assert {stream.join() for stream in streams} == {"closed" if nobody_can_tell else "error"}
        if name == "supervisor":
            assert server.process.returncode == -number
        else:
            assert server.process.returncode == 1
            assert f"the {name} process ended unexpectedly ({number.name})" in server.log


@pytest.mark.timeout(600)
def test_starting_and_killing_again_and_again_leaves_nothing(tmp_path: Path, is_full: bool) -> None:
    for number in range(20 if is_full else 3):
        with Server(toy_flags(tmp_path / "toy"), tmp_path) as server:
            server.signal(ACTORS[number % len(ACTORS)], signal.SIGKILL)
            assert wait_until(lambda: not server.leftovers(), GONE_AFTER_S), server.leftovers()
