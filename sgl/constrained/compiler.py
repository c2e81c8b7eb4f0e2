"""Compiles grammars beside the work of others, and keeps those that were used last.

    submit ──▶ a trial in another process ──▶ compiled here, too ──▶ receive: (key, a matcher
                (trials.py)                   quick ones and slow      or the error)
                                              ones on their own threads

What passes its trial can be compiled here: it does not hang, take all memory or crash. llguidance
lets other threads run meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import Self

from sgl.constrained.matcher import CompiledGrammar, GrammarVocabulary, Matcher, VocabularyFacts
from sgl.constrained.trial import Outcome
from sgl.constrained.trials import Trials
from sgl.errors import EngineError, OverloadedError, RequestError
from sgl.sampling_params import Grammar

QUICK_S = 0.05
MAX_LEFT_S = 4.0  # of compiling that waits on one thread
STACK_BYTES = 2**26  # of threads: more than a trial has
MAX_KEPT_CHARS = 20_000_000  # of all grammars that are kept: what compiles to much is long
LEAST_CHARS = 10_000  # that one counts for

Compiled = Matcher | RequestError
_Done = CompiledGrammar | RequestError

logger = logging.getLogger(__name__)


class GrammarCompiler:
    """For one thread that submits and receives.

    make_facts  called once, by the first grammar, on a thread
    """

    def __init__(self, make_facts: Callable[[], VocabularyFacts]) -> None:
        self._make_facts = make_facts
        self._waiting: dict[Grammar, list[int]] = {}  # the keys that wait for each
        self._submitted: SimpleQueue[Grammar | None] = SimpleQueue()  # None: nothing more comes
        self._done: SimpleQueue[tuple[Grammar, _Done]] = SimpleQueue()
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._num_chars = 0
        self._done_fd, self._submitted_fd = (
            os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)
        )
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def find(self, grammar: Grammar) -> Matcher | None:
        """A matcher at once, if the grammar is kept."""
        compiled = self._kept.get(grammar)
        if compiled is None:
            return None
        if compiled.is_used_up:
            del self._kept[grammar]
            self._num_chars -= _weight(grammar)
            return None
        self._kept.move_to_end(grammar)
        return compiled.matcher()

    def submit(self, key: int, grammar: Grammar) -> None:
        if self._thread is None:
            self._thread = _start_thread(self._run)
        if grammar in self._waiting:
            self._waiting[grammar].append(key)
            return
        self._waiting[grammar] = [key]
        self._submitted.put(grammar)
        os.eventfd_write(self._submitted_fd, 1)

    def receive(self) -> list[tuple[int, Compiled]]:
        """What is done since the last call; raises what has ended the compiling for good."""
        if self._failure:
            raise self._failure
        found: list[tuple[int, Compiled]] = []
        if not self._done.empty():
            _reset(self._done_fd)  # it is written after what it tells of
        while not self._done.empty():
            grammar, compiled = self._done.get()
            keys = self._waiting.pop(grammar)
            if isinstance(compiled, CompiledGrammar):
                self._keep(grammar, compiled)
                found += [(key, compiled.matcher()) for key in keys]
            else:
                found += [(key, compiled) for key in keys]
        return found

    def forget(self) -> None:
        """Keep none of them."""
        self._kept.clear()
        self._num_chars = 0

    def fileno(self) -> int:
        return self._done_fd

    def close(self) -> None:
        """End the threads, and the process of the trials. Its own process may end without this."""
        self._submitted.put(None)
        os.eventfd_write(self._submitted_fd, 1)
        if self._thread:
            self._thread.join()
        os.close(self._done_fd)
        os.close(self._submitted_fd)

    def _run(self) -> None:
        """The thread that hands grammars on; what ends it, `receive` raises."""
        try:
            with ExitStack() as stack:
                try:
                    facts = self._make_facts()
                    trials = stack.enter_context(Trials(facts, self._submitted_fd))
                    vocabulary = GrammarVocabulary(facts)
                except Exception as error:  # none with this tokenizer; all else is served
                    self._refuse_all(error)
                    return
                quick, slow = (
                    stack.enter_context(_Bench(vocabulary, self._tell)) for _ in range(2)
                )
                self._hand_on(trials, quick, slow)
        except Exception as error:
            self._failure = error
            os.eventfd_write(self._done_fd, 1)

    def _refuse_all(self, error: Exception) -> None:
        if not isinstance(error, RequestError):
            logger.error("Grammars cannot be served", exc_info=error)
            error = EngineError(f"grammars cannot be served: {error}")
        while grammar := self._submitted.get():
            self._tell(grammar, error)

    def _hand_on(self, trials: Trials, quick: _Bench, slow: _Bench) -> None:
        while True:
            for grammar, tried in trials.wait():
                if isinstance(tried, RequestError):
                    self._tell(grammar, tried)
                else:
                    (quick if tried.took_s < QUICK_S else slow).take(grammar, tried)
            _reset(self._submitted_fd)
            while not self._submitted.empty():
                if (submitted := self._submitted.get()) is None:
                    return
                trials.add(submitted)

    def _tell(self, grammar: Grammar, done: _Done) -> None:
        self._done.put((grammar, done))
        os.eventfd_write(self._done_fd, 1)

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        if grammar not in self._kept:
            self._kept[grammar] = compiled
            self._num_chars += _weight(grammar)
        while self._num_chars > MAX_KEPT_CHARS:
            oldest, _ = self._kept.popitem(last=False)
            self._num_chars -= _weight(oldest)


class _Bench:
    """A thread that compiles grammars one after the other, and tells of each."""

    def __init__(
        self, vocabulary: GrammarVocabulary, tell: Callable[[Grammar, _Done], None]
    ) -> None:
        self._vocabulary = vocabulary
        self._tell = tell
        self._todo: SimpleQueue[tuple[Grammar, Outcome] | None] = SimpleQueue()
        self._lock = threading.Lock()  # of the number below
        self._left_s = 0.0  # to compile all that was taken
        self._thread = _start_thread(self._run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._todo.put(None)
        self._thread.join()

    def take(self, grammar: Grammar, outcome: Outcome) -> None:
        """Compile it, or refuse it where too much is still to be done."""
        with self._lock:
            is_full = 0 < self._left_s > MAX_LEFT_S - outcome.took_s
            self._left_s += 0.0 if is_full else outcome.took_s
        if is_full:
            why = "grammars that take seconds to compile wait for each other: try again"
            self._tell(grammar, OverloadedError(f"{grammar.kind}: {why}"))
        else:
            self._todo.put((grammar, outcome))

    def _run(self) -> None:
        while todo := self._todo.get():
            grammar, outcome = todo
            self._tell(grammar, self._compile(grammar, outcome))
            with self._lock:
                self._left_s -= outcome.took_s

    def _compile(self, grammar: Grammar, outcome: Outcome) -> _Done:
        try:
            return CompiledGrammar(grammar.kind, outcome.text, self._vocabulary)
        except RequestError as error:
            return error
        except Exception as error:  # the library's; whoever asked must hear back
            logger.exception("a grammar cannot be compiled")
            return EngineError(f"the grammar cannot be compiled: {error}")


def _start_thread(target: Callable[[], None]) -> threading.Thread:
    """With a larger stack. The end of the process does not wait for it."""
    usual = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=target, name="grammar", daemon=True)
        thread.start()
    finally:
        threading.stack_size(usual)
    return thread


def _reset(event_fd: int) -> None:
    with suppress(BlockingIOError):
        os.eventfd_read(event_fd)


def _weight(grammar: Grammar) -> int:
    part = 0 if grammar.part is None else _weight(grammar.part)
    return max(len(grammar.text), LEAST_CHARS) + part
