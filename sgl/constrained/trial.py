"""`python -m sgl.constrained.trial SOCKET FACTS PARENT`: a process that tries grammars out.

    trials.py ── a grammar, a pipe ──▶ this process ── fork ──▶ translates and compiles it,
        ▲                             has the vocabulary          says how that went, ends
        └───────────────────────── the pipe ───────────────────────┘

Whatever a grammar does to its compiler, it does to a process of its own: it may hang for a while,
take memory up to a limit, or crash.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import NoReturn

import msgspec
from setproctitle import setproctitle

from sgl.constrained.matcher import CompiledGrammar, GrammarVocabulary, VocabularyFacts
from sgl.constrained.translation import translate
from sgl.errors import InvalidRequestError
from sgl.processes import die_with_parent
from sgl.sampling_params import Grammar

LIMIT_S = 2.0  # of a core
PATIENCE_S = 3.0  # where others have the cores
MAX_BYTES = 2**30  # more than before
STACK_BYTES = 2**23  # less than the thread has that compiles what passes
NICENESS = 5
GREETING = 4  # bytes in front of the outcome: the pid of the process that tries


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """How a trial went.

    text     the grammar in llguidance's language; empty where there is a problem
    problem  what is wrong with it
    took_s   of a core, to translate and compile it
    """

    text: str
    problem: str
    took_s: float


def main(socket_fd: int, facts_fd: int) -> None:
    """Serve until the other end of the socket is closed."""
    setproctitle("sgl::grammars")
    orders = socket.socket(fileno=socket_fd)
    vocabulary, json_space = _read_vocabulary(facts_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that try
    while True:
        message, fds, _, _ = socket.recv_fds(orders, 1, 2)
        if not message:
            return
        with suppress(OSError):  # no room for another process: its pipe is closed, which tells
            if os.fork() == 0:
                _try_out(vocabulary, json_space, *fds)
        for fd in fds:
            os.close(fd)


def _read_vocabulary(facts_fd: int) -> tuple[GrammarVocabulary, str]:
    with os.fdopen(facts_fd, "rb") as file:
        file.seek(0)
        facts = msgspec.msgpack.decode(file.read(), type=VocabularyFacts)
    return GrammarVocabulary(facts), facts.json_space


def _try_out(
    vocabulary: GrammarVocabulary, json_space: str, grammar_fd: int, pipe_fd: int
) -> NoReturn:
    """In a process of its own: never returns, whatever happens."""
    try:
        _limit_this_process()
        with os.fdopen(pipe_fd, "wb") as pipe, os.fdopen(grammar_fd, "rb") as file:
            pipe.write(os.getpid().to_bytes(GREETING, "little"))
            pipe.flush()
            file.seek(0)
            grammar = msgspec.msgpack.decode(file.read(), type=Grammar)
            pipe.write(msgspec.msgpack.encode(_outcome(grammar, vocabulary, json_space)))
    finally:
        os._exit(0)


def _limit_this_process() -> None:
    die_with_parent(os.getppid())
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    os.nice(NICENESS)
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    for limit, most in (
        (resource.RLIMIT_AS, held + MAX_BYTES),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (most if hard < 0 else min(most, hard), hard))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stderr.fileno())  # the last words of a crash are nobody's concern


def _outcome(grammar: Grammar, vocabulary: GrammarVocabulary, json_space: str) -> Outcome:
    begun = time.process_time()
    text = problem = ""
    try:
        text = translate(grammar, json_space)
        CompiledGrammar(grammar.kind, text, vocabulary)
    except InvalidRequestError as error:
        text, problem = "", str(error)
    return Outcome(text, problem, time.process_time() - begun)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[3]))
    main(int(sys.argv[1]), int(sys.argv[2]))
