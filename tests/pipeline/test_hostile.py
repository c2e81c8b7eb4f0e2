"""Requests made to break the server disturb nobody: not it, and not those who use it meanwhile."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator

import pytest
from hostile import HostileRequest, hostile_requests
from pipeline.server import CLIENT_TIMEOUT_S, Server, Stream
from toy import VOCAB_SIZE, toy_flags

pytestmark = pytest.mark.alone

ANSWERED_AFTER_S = 2.0
PROMPTS = [f"{number} little pigs went to market and" for number in range(20)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    with Server(toy_flags(folder / "toy"), folder) as server:
        yield server


class GoodClients:
    """Twenty greedy streams, each begun anew when it ends, until told to stop."""

    def __init__(self, server: Server) -> None:
        self.answers: list[tuple[str, str | None, list[int]]] = []
        self._server = server
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=[prompt]) for prompt in PROMPTS]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, prompt: str) -> None:
        while not self._is_over.is_set():
            self.answers.append((prompt, *ask(self._server, prompt)))


def ask(server: Server, prompt: str) -> tuple[str | None, list[int]]:
    stream = Stream(server, prompt=prompt, num_tokens=48)
    return stream.join(), stream.output_ids


def post(connection: http.client.HTTPConnection, hostile: HostileRequest) -> str:
    """What is wrong with the answer; empty if nothing is."""
    started = time.monotonic()
    connection.request("POST", hostile.path, hostile.body, {"Content-Type": hostile.content_type})
    response = connection.getresponse()
    body, waited_s = response.read(), time.monotonic() - started
    if not 400 <= response.status < 500:
        return f"{hostile.name}: status {response.status}, {body[:200]!r}"
    if waited_s > ANSWERED_AFTER_S:
        return f"{hostile.name}: {waited_s:.1f} s"
    return "" if json.loads(body) else f"{hostile.name}: an empty answer"


def test_hostile_requests_are_refused_and_disturb_nobody(server: Server) -> None:
    expected = {prompt: ask(server, prompt) for prompt in PROMPTS}
    assert {end for end, _ in expected.values()} == {"complete"}
    actors = server.actors()
    good = GoodClients(server)
    connection = server.connection()
    try:
        requests = list(hostile_requests(VOCAB_SIZE))
        faults = [fault for request in requests if (fault := post(connection, request))]
    finally:
        good.stop()
        connection.close()
    assert len(requests) >= 150
    assert not faults, "\n".join(faults)
    assert len(good.answers) >= len(PROMPTS)
    assert all(expected[prompt] == (end, ids) for prompt, end, ids in good.answers)
    assert server.actors() == actors
    assert server.is_ready
    assert "Traceback" not in server.log


def test_clients_that_send_half_a_request_or_no_http_are_let_go(server: Server) -> None:
    for data in (b"GET /health HT", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"\0" * 4096):
        connection = server.connection()
        connection.connect()
        connection.sock.sendall(data)
        connection.close()
    connection = server.connection()
    connection.connect()
    connection.sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1_000_000)
    connection.sock.settimeout(CLIENT_TIMEOUT_S)
    assert b" 400 " in connection.sock.recv(4096).split(b"\r\n")[0]
    connection.close()
    assert server.is_ready
    assert "Traceback" not in server.log
