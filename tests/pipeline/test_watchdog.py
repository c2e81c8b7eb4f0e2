"""A process that hangs is noticed; one that is only slow, or has nothing to do, is left alone."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from pipeline.server import ACTORS, Server, start_streams, wait_until
from toy import toy_flags

pytestmark = pytest.mark.alone

TIMEOUT_S = 3.0
SLOW_TIMEOUT_S = 10.0  # half of it is left, on a busy machine too, once the stacks are dumped
TOLD_AFTER_S = 5.0
GONE_AFTER_S = 10.0
SAMPLE = ("worker0", "ingress")


def watched_server(folder: Path, timeout_s: float = TIMEOUT_S) -> Server:
    flags = [*toy_flags(folder / "toy"), "--watchdog-timeout", str(timeout_s)]
    return Server(flags, folder)


@pytest.mark.parametrize("name", ACTORS)
def test_server_ends_when_a_process_hangs(name: str, tmp_path: Path, is_full: bool) -> None:
    if not is_full and name not in SAMPLE:
        pytest.skip("one of the sample; all with --full")
    with watched_server(tmp_path) as server:
        streams = start_streams(server, 4)
        server.signal(name, signal.SIGSTOP)
        stopped = time.monotonic()
        if name != "ingress":  # which is the one that could tell them
            assert {stream.join(TOLD_AFTER_S) for stream in streams} == {"error"}
        left_s = GONE_AFTER_S - (time.monotonic() - stopped)
        assert wait_until(lambda: not server.leftovers(), left_s), server.leftovers()
        assert {stream.join() for stream in streams} <= {"error", "closed"}
        assert server.process.returncode == 1
        assert f"{name} made no progress for 3 s" in server.log


def test_stacks_are_dumped_of_a_process_that_stands_still_and_goes_on(tmp_path: Path) -> None:
    with watched_server(tmp_path, SLOW_TIMEOUT_S) as server:
        [stream] = start_streams(server, 1, num_tokens=100)
        server.signal("scheduler", signal.SIGSTOP)
        assert wait_until(lambda: "scheduler makes no progress" in server.log, SLOW_TIMEOUT_S)
        server.signal("scheduler", signal.SIGCONT)
        assert stream.join() == "complete"
        assert "most recent call first" in server.log
        assert "scheduler.py" in server.log
        assert server.is_ready


def test_idle_server_raises_no_alarm(tmp_path: Path) -> None:
    with watched_server(tmp_path) as server:
        time.sleep(8.0)
        assert server.is_ready
        assert "no progress" not in server.log
