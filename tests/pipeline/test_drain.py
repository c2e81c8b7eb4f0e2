"""Stopping on purpose: running answers are finished, nobody is cut off, the exit code says so."""

from __future__ import annotations

import random
import signal
import socket
import time
from pathlib import Path

import pytest
from pipeline.server import Server, start_streams, wait_until
from toy import toy_flags, write_toy

pytestmark = pytest.mark.alone

GONE_AFTER_S = 2.0
DRAIN_S = 60.0


def test_running_answers_are_finished_and_new_ones_refused(tmp_path: Path) -> None:
    with Server(toy_flags(tmp_path / "toy"), tmp_path) as server:
        streams = start_streams(server, 16, num_tokens=400)
        server.signal("supervisor", signal.SIGTERM)
        assert wait_until(lambda: not server.is_ready, GONE_AFTER_S)
        refusals = []
        while streams[0].end is None:
            refusals.append(server.post("/generate", {"text": "Once"}))
            time.sleep(0.02)
        assert {status for status, _ in refusals} == {503}
        assert all(b"shutting down" in body for _, body in refusals)
        assert {stream.join(DRAIN_S) for stream in streams} == {"complete"}
        assert {len(stream.output_ids) for stream in streams} == {400}
        assert wait_until(lambda: not server.leftovers(), GONE_AFTER_S), server.leftovers()
        assert server.process.returncode == 0


def test_drain_timeout_ends_what_still_runs(tmp_path: Path) -> None:
    flags = [*toy_flags(tmp_path / "toy"), "--drain-timeout", "0.2"]
    with Server(flags, tmp_path) as server:
        streams = start_streams(server, 4)
        server.signal("supervisor", signal.SIGTERM)
        assert {stream.join() for stream in streams} == {"error"}
        assert wait_until(lambda: not server.leftovers(), GONE_AFTER_S), server.leftovers()
        assert server.process.returncode == 0


def test_second_interrupt_ends_the_server_at_once(tmp_path: Path) -> None:
    with Server(toy_flags(tmp_path / "toy"), tmp_path) as server:
        streams = start_streams(server, 4)
        server.signal("supervisor", signal.SIGINT)
        assert wait_until(lambda: not server.is_ready, GONE_AFTER_S)
        server.signal("supervisor", signal.SIGINT)
        assert wait_until(lambda: not server.leftovers(), GONE_AFTER_S), server.leftovers()
        assert {stream.join() for stream in streams} <= {"error", "closed"}
        assert server.process.returncode != 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signal_during_the_start_ends_it_and_leaves_nothing(
    number: signal.Signals, tmp_path: Path, is_full: bool
) -> None:
    instants = random.Random(int(number))
    for _ in range(20 if is_full else 4):
        server = Server(toy_flags(tmp_path / "toy"), tmp_path).start()
        try:
            time.sleep(instants.uniform(0.0, 3.0))
            server.process.send_signal(number)
            assert wait_until(lambda server=server: not server.leftovers(), GONE_AFTER_S), (
                server.leftovers()
            )
        finally:
            server.stop()


def test_port_in_use_is_one_paragraph_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        server = Server(toy_flags(tmp_path / "toy"), tmp_path, port=port)
        assert f"port {port}" in refusal(server)


@pytest.mark.parametrize(
    "flags",
    [
        ["--model-path", "/no/such/folder"],
        ["--model-path", "empty"],
        ["--context-length", "100000"],
        ["--dtype", "int3"],
        ["--no-such-flag"],
    ],
    ids=lambda flags: flags[0] + flags[-1],
)
def test_wrong_flags_are_one_paragraph_and_exit_code_2(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    flags = [str(tmp_path / flag) if flag == "empty" else flag for flag in flags]
    server = Server([*toy_flags(tmp_path / "toy"), *flags], tmp_path)
    assert flags[0] in refusal(server)
    server.port = 0  # it never had one
    assert not server.leftovers()


def test_wrong_weights_are_one_paragraph_and_exit_code_2(tmp_path: Path) -> None:
    """Found out by the worker, when the others have started already."""
    flags = [*toy_flags(tmp_path / "toy"), "--load-format", "safetensors"]
    server = Server(flags, tmp_path)
    assert str(write_toy(tmp_path / "toy")) in refusal(server)
    assert not server.leftovers()


def refusal(server: Server) -> str:
    """What a server that cannot start has to say."""
    server.start()
    try:
        assert server.process.wait(30) == 2, server.log
    finally:
        server.stop()
    assert server.log.startswith("sgl: "), server.log
    assert len(server.log.splitlines()) == 1, server.log
    return server.log
