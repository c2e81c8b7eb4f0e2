"""Has grammars tried out in processes of their own, several at a time; see trial.py.

    start ──▶ young, up to 4 ── after 0.2 s of a core ──▶ old, up to 4 ── after 2 s ──▶ killed
                    └───── done ──▶ outcome ◀── done ───────┘

So one that compiles at once waits for others a moment at most, whatever these are.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from sgl.constrained.grammar import refused
from sgl.constrained.matcher import VocabularyFacts
from sgl.constrained.testers import Tester, TesterFactory
from sgl.constrained.trial import LIMIT_S, MAX_BYTES, Outcome
from sgl.errors import EngineError, InvalidRequestError, OverloadedError, RequestError
from sgl.sampling_params import Grammar

MAX_YOUNG = 4
YOUNG_S = 0.2  # of a core
MAX_OLD = 4
MAX_IDLE = 2  # testers that are kept for what comes
MAX_TRIALS = 100  # of one tester: then what it has not given back of its memory is
LOOK_S = 0.1  # how often it is seen who got old

Tried = Outcome | RequestError


@dataclass(slots=True, eq=False)
class _Trial:
    grammar: Grammar
    tester: Tester
    is_old: bool = False


class Trials:
    """For one thread.

    wake_fd  `wait` returns early when it is readable
    """

    def __init__(self, facts: VocabularyFacts, wake_fd: int) -> None:
        self._wake_fd = wake_fd
        self._factory = TesterFactory(facts)
        self._waiting: deque[Grammar] = deque()
        self._running: dict[int, _Trial] = {}  # by descriptor
        self._idle: list[Tester] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tester in [*self._idle, *(trial.tester for trial in self._running.values())]:
            tester.close()
        self._factory.close()

    def add(self, grammar: Grammar) -> None:
        self._waiting.append(grammar)

    def wait(self) -> Iterator[tuple[Grammar, Tried]]:
        """Go on with what there is; what comes to an end meanwhile."""
        self._start_some()
        poller = select.poll()
        for fd in (self._wake_fd, *self._running):
            poller.register(fd, select.POLLIN)
        ready = poller.poll(LOOK_S * 1000 if self._running else None)
        for fd, _ in ready:
            if trial := self._running.get(fd):
                yield from self._receive(trial)
        yield from self._age()

    def _start_some(self) -> None:
        num_young = sum(not trial.is_old for trial in self._running.values())
        for _ in range(min(MAX_YOUNG - num_young, len(self._waiting))):
            tester = self._idle_tester() or self._factory.make()
            trial = _Trial(self._waiting.popleft(), tester)
            tester.try_out(trial.grammar)
            self._running[tester.fileno()] = trial

    def _idle_tester(self) -> Tester | None:
        while self._idle:
            tester = self._idle.pop()
            if not tester.has_ended:
                return tester
            tester.close()
        return None

    def _receive(self, trial: _Trial) -> Iterator[tuple[Grammar, Tried]]:
        tester = trial.tester
        try:
            outcome = tester.receive()
        except EOFError:
            del self._running[tester.fileno()]
            tester.close()
            if tester.num_tried > 1 and not _took_long(tester):
                self._waiting.appendleft(trial.grammar)  # it may have ended for another reason
            else:
                yield trial.grammar, _last_words(trial)
            return
        if outcome is None:
            return
        del self._running[tester.fileno()]
        if trial.is_old or tester.num_tried >= MAX_TRIALS or len(self._idle) >= MAX_IDLE:
            tester.close()
        else:
            self._idle.append(tester)
        is_fine = not outcome.problem
        yield trial.grammar, outcome if is_fine else _problem(trial.grammar, outcome.problem)

    def _age(self) -> Iterator[tuple[Grammar, Tried]]:
        """Those that get old go on behind the others, or end where enough of them do."""
        num_old = sum(trial.is_old for trial in self._running.values())
        for fd, trial in [*self._running.items()]:
            if trial.is_old or not trial.tester.pid or trial.tester.used_s < YOUNG_S:
                continue
            if num_old < MAX_OLD:
                num_old += 1
                trial.is_old = True
                trial.tester.slow_down()
                continue
            del self._running[fd]
            trial.tester.kill()
            yield trial.grammar, _too_many_old(trial.grammar)


def _problem(grammar: Grammar, problem: str) -> RequestError:
    return InvalidRequestError(problem, param=grammar.kind)


def _last_words(trial: _Trial) -> RequestError:
    """Of a tester that has ended over its grammar."""
    kind, tester = trial.grammar.kind, trial.tester
    if not tester.pid:
        return EngineError("the grammar cannot be compiled: there is no process to try it out in")
    if _took_long(tester):
        return refused(kind, f"it takes over {LIMIT_S:.0f} s to compile: make it smaller")
    return refused(
        kind,
        f"it breaks the compiler, or needs over {MAX_BYTES >> 20} MB there: make it smaller, or "
        "less deeply nested",
    )


def _took_long(tester: Tester) -> bool:
    return tester.waited_s >= LIMIT_S * 0.9


def _too_many_old(grammar: Grammar) -> RequestError:
    return OverloadedError(
        f"{grammar.kind}: the server compiles {MAX_OLD} other grammars that take over {YOUNG_S} s: "
        "try again"
    )
