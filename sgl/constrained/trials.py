"""Has grammars tried out in processes of their own, several at a time; see trial.py.

    start ──▶ young, up to 4 ── after 0.2 s of a core ──▶ old, up to 4 ── after 2 s ──▶ killed
                    └───── done ──▶ outcome ◀── done ───────┘

So one that compiles at once waits for others a moment at most, whatever these are.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec

from sgl.constrained.grammar import refused
from sgl.constrained.matcher import VocabularyFacts
from sgl.constrained.trial import GREETING, LIMIT_S, MAX_BYTES, NICENESS, Outcome
from sgl.errors import EngineError, InvalidRequestError, OverloadedError, RequestError
from sgl.sampling_params import Grammar

MAX_YOUNG = 4
YOUNG_S = 0.2  # of a core
MAX_OLD = 4

Tried = Outcome | RequestError


@dataclass(slots=True)
class _Trial:
    grammar: Grammar
    pipe_fd: int
    begun_s: float = 0.0  # 0: the process did not greet yet
    is_old: bool = False
    received: bytearray = field(default_factory=bytearray)

    @property
    def pid(self) -> int:
        return int.from_bytes(self.received[:GREETING], "little")

    @property
    def used_s(self) -> float:
        """Of a core."""
        try:
            words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            return 0.0
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def grow_old(self) -> None:
        """It gets what the young ones leave it of the cores."""
        self.is_old = True
        os.setpriority(os.PRIO_PROCESS, self.pid, 2 * NICENESS)


class Trials:
    """For one thread. The process that tries is started at once, and anew when it has ended.

    wake_fd  `wait` returns early when it is readable
    """

    def __init__(self, facts: VocabularyFacts, wake_fd: int) -> None:
        self._facts = facts
        self._wake_fd = wake_fd
        self._waiting: deque[Grammar] = deque()
        self._running: dict[int, _Trial] = {}  # by descriptor
        self._process, self._orders = _start_process(facts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._running:
            os.close(fd)
        self._orders.close()
        self._process.kill()
        self._process.wait()

    def add(self, grammar: Grammar) -> None:
        self._waiting.append(grammar)

    def wait(self) -> Iterator[tuple[Grammar, Tried]]:
        """Go on with what there is; what comes to an end meanwhile."""
        self._start_some()
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        for fd in self._running:
            poller.register(fd, select.POLLIN)
        patience_ms = YOUNG_S * 500 if self._running else None
        ready = {fd for fd, _ in poller.poll(patience_ms)}
        now_s = time.monotonic()
        for fd in ready & self._running.keys():
            trial = self._running[fd]
            if self._receive(trial, now_s):
                continue
            yield trial.grammar, self._end(trial, now_s)
        yield from self._refuse_some(now_s)

    def _start_some(self) -> None:
        num_young = sum(not trial.is_old for trial in self._running.values())
        for _ in range(min(MAX_YOUNG - num_young, len(self._waiting))):
            trial = self._start(self._waiting.popleft())
            self._running[trial.pipe_fd] = trial

    def _start(self, grammar: Grammar) -> _Trial:
        if self._process.poll() is not None:
            self._orders.close()
            self._process, self._orders = _start_process(self._facts)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        grammar_fd = _memfd("sgl-grammar", msgspec.msgpack.encode(grammar))
        with suppress(OSError):  # it has just ended: then nobody writes into the pipe
            socket.send_fds(self._orders, [b"g"], [grammar_fd, theirs])
        os.close(theirs)
        os.close(grammar_fd)
        return _Trial(grammar, ours)

    def _receive(self, trial: _Trial, now_s: float) -> bool:
        """Whether more may come."""
        piece = os.read(trial.pipe_fd, 2**20)
        trial.received += piece
        trial.begun_s = trial.begun_s or now_s
        return bool(piece)

    def _end(self, trial: _Trial, now_s: float) -> Tried:
        del self._running[trial.pipe_fd]
        os.close(trial.pipe_fd)
        if len(trial.received) < GREETING:
            return EngineError("the grammar cannot be compiled: there is no process to do it in")
        kind = trial.grammar.kind
        if said := trial.received[GREETING:]:
            outcome = msgspec.msgpack.decode(said, type=Outcome)
            return InvalidRequestError(outcome.problem, param=kind) if outcome.problem else outcome
        if now_s - trial.begun_s >= LIMIT_S * 0.9:
            return refused(kind, f"it takes over {LIMIT_S:.0f} s to compile: make it smaller")
        return refused(
            kind,
            f"it breaks the compiler, or needs over {MAX_BYTES >> 20} MB there: make it smaller, "
            "or less deeply nested",
        )

    def _refuse_some(self, now_s: float) -> Iterator[tuple[Grammar, Tried]]:
        """Those that get old where enough are. All of these live: their pipes are open."""
        num_old = sum(trial.is_old for trial in self._running.values())
        for trial in [*self._running.values()]:
            if trial.is_old or not trial.begun_s or trial.used_s < YOUNG_S:
                continue
            if num_old < MAX_OLD:
                num_old += 1
                trial.grow_old()
                continue
            os.kill(trial.pid, signal.SIGKILL)
            self._end(trial, now_s)
            yield (
                trial.grammar,
                OverloadedError(
                    f"{trial.grammar.kind}: the server compiles {MAX_OLD} other grammars that take "
                    f"over {YOUNG_S} s: try again"
                ),
            )


def _start_process(facts: VocabularyFacts) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and where to send it what it shall try."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    facts_fd = _memfd("sgl-vocabulary", msgspec.msgpack.encode(facts))
    numbers = [str(number) for number in (theirs.fileno(), facts_fd, os.getpid())]
    process = subprocess.Popen(
        [sys.executable, "-m", "sgl.constrained.trial", *numbers],
        pass_fds=[theirs.fileno(), facts_fd],
        stdin=subprocess.DEVNULL,
        env=_environment(),
    )
    theirs.close()
    os.close(facts_fd)
    return process, ours


def _environment() -> dict[str, str]:
    """With this package in reach, and without threads that a fork would leave behind."""
    folder = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    alone = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | alone | {"PYTHONPATH": path}


def _memfd(name: str, content: bytes) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    return fd
