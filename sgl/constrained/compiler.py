"""Compiles grammars on threads of its own, and keeps those that were used last.

    submit(key, grammar) ──▶ thread ──▶ receive(): (key, a matcher or the error)

llguidance lets other threads run while it compiles.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from sgl.constrained.matcher import CompiledGrammar, GrammarVocabulary, Matcher
from sgl.errors import EngineError, RequestError
from sgl.sampling_params import Grammar

NUM_THREADS = 2
MAX_KEPT_CHARS = 20_000_000  # of all grammars that are kept: what compiles to much is long
LEAST_CHARS = 10_000  # that one counts for

Compiled = Matcher | RequestError

logger = logging.getLogger(__name__)


class GrammarCompiler:
    """For one thread that submits and receives.

    make_vocabulary  called once, by the first grammar, on a thread; takes half a second
    """

    def __init__(self, make_vocabulary: Callable[[], GrammarVocabulary]) -> None:
        self._make_vocabulary = make_vocabulary
        self._vocabulary: GrammarVocabulary | None = None
        self._lock = threading.Lock()  # of the vocabulary
        self._todo: SimpleQueue[tuple[int, Grammar]] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, Grammar, CompiledGrammar | RequestError]] = SimpleQueue()
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._num_chars = 0
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for _ in range(NUM_THREADS):  # the end of the process does not wait for these
            threading.Thread(target=self._work, name="grammar", daemon=True).start()

    def find(self, grammar: Grammar) -> Matcher | None:
        """A matcher at once, if the grammar is kept."""
        compiled = self._kept.get(grammar)
        if compiled is None:
            return None
        self._kept.move_to_end(grammar)
        return compiled.matcher()

    def submit(self, key: int, grammar: Grammar) -> None:
        self._todo.put((key, grammar))

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

    def forget(self) -> None:
        """Keep none of them."""
        self._kept.clear()
        self._num_chars = 0

    def fileno(self) -> int:
        return self._event_fd

    def _work(self) -> None:
        while True:
            key, grammar = self._todo.get()
            self._done.put((key, grammar, self._compile(grammar)))
            os.eventfd_write(self._event_fd, 1)

    def _compile(self, grammar: Grammar) -> CompiledGrammar | RequestError:
        try:
            with self._lock:
                self._vocabulary = self._vocabulary or self._make_vocabulary()
            return CompiledGrammar(grammar, self._vocabulary)
        except RequestError as error:
            return error
        except Exception as error:  # the library's; whoever asked must hear back
            logger.exception("a grammar cannot be compiled")
            return EngineError(f"the grammar cannot be compiled: {error}")

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        if grammar not in self._kept:
            self._kept[grammar] = compiled
            self._num_chars += _weight(grammar)
        while self._num_chars > MAX_KEPT_CHARS:
            oldest, _ = self._kept.popitem(last=False)
            self._num_chars -= _weight(oldest)


def _weight(grammar: Grammar) -> int:
    return max(len(grammar.text), LEAST_CHARS)
