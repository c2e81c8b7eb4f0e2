"""A server started as a user starts it, clients of it, and what is left when it has ended.

    with Server(toy_flags(folder / "toy"), folder) as server:
        stream = Stream(server)                       a thread that reads one streamed answer
        server.signal("worker0", signal.SIGKILL)
        wait_until(lambda: not server.leftovers(), 3.0)

The server leads a session of its own: whatever it starts is found by the number of that session,
orphans and zombies included.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
PORTS = range(31000, 32000)
START_TIMEOUT_S = 60.0
CLIENT_TIMEOUT_S = 30.0
ACTORS = ("ingress", "scheduler", "worker0", "detokenizer")


def wait_until(holds: Callable[[], object], timeout_s: float) -> bool:
    """Whether `holds` came to hold in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def free_port() -> int:
    """Below the ports that clients are given, so that none of them takes it in between."""
    while not can_bind(port := random.choice(PORTS)):
        pass
    return port


def can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def processes_of_session(session: int) -> dict[int, str]:
    """pid -> title of all that are in it; a zombie's title is "zombie".

    A zombie whose parent has ended as well is not counted: it is for init to bury.
    """
    found: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):  # it ended while we looked
            words = (folder / "stat").read_text().rpartition(")")[2].split()
            state, parent, its_session = words[0], int(words[1]), int(words[3])
            if its_session != session or (state == "Z" and parent == 1):
                continue
            title = (folder / "cmdline").read_text().strip("\0 ")
            found[int(folder.name)] = "zombie" if state == "Z" else title
    return found


class Server:
    """`python -m sgl.launch_server` with `flags`, on a port and with a temporary folder of its own.

    It need not get ready, or even start: `start` does not wait.
    """

    def __init__(self, flags: Sequence[str], folder: Path, *, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        self.folder = folder / f"server-{self.port}-{random.getrandbits(32):x}"
        self._flags = [*flags, "--port", str(self.port), "--stream-output"]
        self._shared_memory: set[str] = set()

    def start(self) -> Server:
        self.temporary.mkdir(parents=True)
        self._shared_memory = set(os.listdir("/dev/shm"))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)}
        environment.pop("XDG_RUNTIME_DIR", None)
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sgl.launch_server", *self._flags],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        resource.prlimit(self.process.pid, resource.RLIMIT_CORE, (0, 0))
        return self

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def _log_path(self) -> Path:
        return self.folder / "log"

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def wait_ready(self) -> None:
        is_ready = wait_until(lambda: self.has_ended or self.is_ready, START_TIMEOUT_S)
        assert is_ready, f"the server was not ready in time\n{self.log}"
        assert not self.has_ended, f"the server ended\n{self.log}"

    @property
    def is_ready(self) -> bool:
        try:
            return self.get("/health/ready")[0] == 200
        except OSError:
            return False

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def pids(self) -> dict[str, int]:
        """Name of a process -> its pid."""
        found = processes_of_session(self.process.pid)
        return {
            "supervisor" if pid == self.process.pid else title.removeprefix("sgl::"): pid
            for pid, title in found.items()
        }

    def actors(self) -> dict[str, int]:
        """The pids of those that live as long as the server."""
        pids = self.pids()
        return {name: pids[name] for name in ("supervisor", *ACTORS)}

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.pids()[name], number)

    def leftovers(self) -> list[str]:
        """What a server that has ended must not leave: processes, a port, files, shared memory."""
        self.process.poll()  # a child of ours: it would be a zombie because of us
        found = processes_of_session(self.process.pid)
        left = [f"process {pid}: {title}" for pid, title in found.items()]
        left += map(str, self.temporary.iterdir())
        left += sorted({*os.listdir("/dev/shm")} - self._shared_memory)
        if not can_bind(self.port):
            left.append(f"port {self.port}")
        return left

    def stop(self) -> None:
        """End what still runs, the hard way."""
        for pid in processes_of_session(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def get(self, path: str) -> tuple[int, bytes]:
        return self._call("GET", path, None)

    def post(self, path: str, body: Any = None) -> tuple[int, bytes]:
        return self._call("POST", path, json.dumps(body).encode())

    def gauge(self, name: str) -> float:
        """A number of /metrics."""
        _, text = self.get("/metrics")
        lines = text.decode().splitlines()
        return next(
            float(line.split()[-1]) for line in lines if line.startswith(f"sglang:{name}{{")
        )

    def _call(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        connection = self.connection()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=CLIENT_TIMEOUT_S)


class Stream:
    """A client that reads one streamed answer on a thread of its own.

    end   how it ended: "complete", "aborted", "error", "closed" by the server, "refused" or
          "hangs"; None while it runs
    """

    def __init__(
        self,
        server: Server,
        *,
        prompt: str = "Once",
        num_tokens: int = 2000,
        rid: str | None = None,
    ) -> None:
        self.end: str | None = None
        self.status = 0
        self.output_ids: list[int] = []
        self.times_s: list[float] = []  # when each event came
        self.has_begun = threading.Event()
        self._connection = server.connection()
        self._connection.connect()
        self._socket = self._connection.sock
        self._body = {
            "text": prompt,
            "rid": rid,
            "stream": True,
            "sampling_params": {
                "max_new_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
            },
        }
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def join(self, timeout_s: float = CLIENT_TIMEOUT_S) -> str | None:
        self._thread.join(timeout_s)
        return self.end

    def leave(self) -> None:
        """Close the connection in the middle of whatever is going on."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        try:
            self.end = self._ask()
        except TimeoutError:
            self.end = "hangs"
        except (OSError, http.client.HTTPException):
            self.end = "closed"
        finally:
            self.has_begun.set()
            self._connection.close()

    def _ask(self) -> str:
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/generate", json.dumps(self._body).encode(), headers)
        response = self._connection.getresponse()
        self.status = response.status
        if response.status != 200:
            return "refused"
        end = "closed"
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if not data or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                return "error"
            self.output_ids += event["output_ids"]
            self.times_s.append(time.monotonic())
            if finish := event["meta_info"]["finish_reason"]:
                end = "aborted" if finish["type"] == "abort" else "complete"
            self.has_begun.set()
        return end


def start_streams(server: Server, count: int, **named: Any) -> list[Stream]:
    """Streams that all have begun."""
    streams = [Stream(server, **named) for _ in range(count)]
    for stream in streams:
        assert stream.has_begun.wait(CLIENT_TIMEOUT_S)
        assert stream.end is None, f"{stream.end}, status {stream.status}\n{server.log}"
    return streams
