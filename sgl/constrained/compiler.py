"""Compiles grammars on threads of its own, and keeps those that were used last.

    submit(key, grammar) ──▶ thread ──▶ receive(): (key, a matcher or the error)

llguidance lets other threads run while it compiles.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue

from sgl.constrained.matcher import CompiledGrammar, GrammarVocabulary, Matcher
from sgl.errors import InvalidRequestError
from sgl.sampling_params import Grammar

NUM_THREADS = 2
MAX_KEPT_CHARS = 20_000_000  # of all grammars that are kept: what compiles to much is long
LEAST_CHARS = 10_000  # that one counts for

Compiled = Matcher | InvalidRequestError


class GrammarCompiler:
    """For one thread that submits and receives.

    make_vocabulary  called once, by the first grammar, on a thread; takes half a second
    """

    def __init__(self, make_vocabulary: Callable[[], GrammarVocabulary]) -> None:
        self._make_vocabulary = make_vocabulary
        self._vocabulary: GrammarVocabulary | None = None
        self._lock = threading.Lock()  # of the vocabulary
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._done: SimpleQueue[tuple[int, Grammar, CompiledGrammar | InvalidRequestError]]
        self._done = SimpleQueue()
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._num_chars = 0
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._event_fd)

    def find(self, grammar: Grammar) -> Matcher | None:
        """A matcher at once, if the grammar is kept."""
        compiled = self._kept.get(grammar)
        if compiled is None:
            return None
        self._kept.move_to_end(grammar)
        return compiled.matcher()

    def submit(self, key: int, grammar: Grammar) -> None:
        self._pool.submit(self._compile, key, grammar)

    def receive(self) -> list[tuple[int, Compiled]]:
        """What is done since the last call."""
        found: list[tuple[int, Compiled]] = []
        if not self._done.empty():
            with suppress(BlockingIOError):  # it is written after what it tells of
                os.eventfd_read(self._event_fd)
        while not self._done.empty():
            key, grammar, compiled = self._done.get()
            if isinstance(compiled, CompiledGrammar):
                self._keep(grammar, compiled)
                found.append((key, compiled.matcher()))
            else:
                found.append((key, compiled))
        return found

    def fileno(self) -> int:
        return self._event_fd

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, key: int, grammar: Grammar) -> None:
        compiled: CompiledGrammar | InvalidRequestError
        try:
            with self._lock:
                self._vocabulary = self._vocabulary or self._make_vocabulary()
            compiled = CompiledGrammar(grammar, self._vocabulary)
        except InvalidRequestError as error:
            compiled = error
        self._done.put((key, grammar, compiled))
        os.eventfd_write(self._event_fd, 1)

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        if grammar not in self._kept:
            self._kept[grammar] = compiled
            self._num_chars += _weight(grammar)
        while self._num_chars > MAX_KEPT_CHARS:
            oldest, _ = self._kept.popitem(last=False)
            self._num_chars -= _weight(oldest)


def _weight(grammar: Grammar) -> int:
    return max(len(grammar.text), LEAST_CHARS)
