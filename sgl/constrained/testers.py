"""The processes of trial.py, as the thread sees them that has grammars tried out."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from sgl.constrained.matcher import VocabularyFacts
from sgl.constrained.trial import NICENESS, NUMBER_BYTES, Outcome
from sgl.sampling_params import Grammar

PIECE_BYTES = 2**20


class Tester:
    """One that has been ordered; it tries one grammar at a time."""

    def __init__(self, ours: socket.socket) -> None:
        self.pid = 0  # 0: it did not begin yet
        self.num_tried = 0
        self._socket = ours
        self._received = bytearray()
        self._begun_s = 0.0
        self._used_before_s = 0.0

    def fileno(self) -> int:
        return self._socket.fileno()

    def try_out(self, grammar: Grammar) -> None:
        """Send it, to be tried as soon as the process begins."""
        self.num_tried += 1
        self._begin()
        grammar_fd = memfd("sgl-grammar", msgspec.msgpack.encode(grammar))
        with suppress(OSError):  # it has ended, which is seen when it is read from
            socket.send_fds(self._socket, [b"g"], [grammar_fd])
        os.close(grammar_fd)

    def receive(self) -> Outcome | None:
        """What it says, once that is complete; raises EOFError where it has ended."""
        try:
            piece = self._socket.recv(PIECE_BYTES)
        except ConnectionError:
            piece = b""
        if not piece:
            raise EOFError
        self._received += piece
        if not self.pid and len(self._received) >= NUMBER_BYTES:
            self.pid = self._number()
            del self._received[:NUMBER_BYTES]
            self._begin()
        end = NUMBER_BYTES + self._number()
        if len(self._received) < end:
            return None
        outcome = msgspec.msgpack.decode(self._received[NUMBER_BYTES:end], type=Outcome)
        del self._received[:end]
        return outcome

    @property
    def has_ended(self) -> bool:
        """Of one that is idle: there is something to read, and that is its end."""
        return bool(select.select([self], [], [], 0)[0])

    @property
    def waited_s(self) -> float:
        """Since it began with its grammar."""
        return time.monotonic() - self._begun_s

    @property
    def used_s(self) -> float:
        """Of a core, for its grammar."""
        return self._used_in_all_s() - self._used_before_s

    def slow_down(self) -> None:
        """Let others have the cores first."""
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, self.pid, 2 * NICENESS)

    def kill(self) -> None:
        """It lives as long as its socket is open at its end, so the number is its own."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """It ends when it is done."""
        self._socket.close()

    def _begin(self) -> None:
        self._begun_s = time.monotonic()
        self._used_before_s = self._used_in_all_s()

    def _used_in_all_s(self) -> float:
        try:
            words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it did not begin, or has just ended
            return 0.0
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def _number(self) -> int:
        return int.from_bytes(self._received[:NUMBER_BYTES], "little")


class TesterFactory:
    """The process that testers are forked from: started at once, and anew when it has ended."""

    def __init__(self, facts: VocabularyFacts) -> None:
        self._facts = facts
        self._start()

    def make(self) -> Tester:
        if self._process.poll() is not None:
            self._orders.close()
            self._start()
        ours, theirs = socket.socketpair()
        with suppress(OSError):  # it has just ended: then nobody has the other end
            socket.send_fds(self._orders, [b"t"], [theirs.fileno()])
        theirs.close()
        return Tester(ours)

    def close(self) -> None:
        self._orders.close()
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        facts_fd = memfd("sgl-vocabulary", msgspec.msgpack.encode(self._facts))
        numbers = [str(number) for number in (theirs.fileno(), facts_fd, os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sgl.constrained.trial", *numbers],
            pass_fds=[theirs.fileno(), facts_fd],
            stdin=subprocess.DEVNULL,
            env=_environment(),
        )
        theirs.close()
        os.close(facts_fd)


def memfd(name: str, content: bytes) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    return fd


def _environment() -> dict[str, str]:
    """With this package in reach, and without threads that a fork would leave behind."""
    folder = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    alone = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | alone | {"PYTHONPATH": path}
