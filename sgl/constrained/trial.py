"""`python -m sgl.constrained.trial SOCKET FACTS PARENT`: grammars are tried out here.

    trials.py ── a socket ──▶ this process ── fork ──▶ a tester: translates and compiles what comes
        ▲                     has the vocabulary       over its socket, and says how that went
        └────────────── grammars, outcomes ──────────────┘

Whatever a grammar does to its compiler, it does to a tester: it may hang for a while, take memory
up to a limit, or crash. The next one is forked in milliseconds.
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

LIMIT_S = 2.0  # of a core, for one grammar
PATIENCE_S = 3.0  # where others have the cores
MAX_BYTES = 2**30  # more than before
STACK_BYTES = 2**23  # less than the thread has that compiles what passes
NICENESS = 5
NUMBER_BYTES = 8  # of the pid that a tester begins with, and of the length of an outcome


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
    """Make testers until the other end of the socket is closed."""
    setproctitle("sgl::grammars")
    orders = socket.socket(fileno=socket_fd)
    facts = msgspec.msgpack.decode(_read_all(facts_fd), type=VocabularyFacts)
    vocabulary = GrammarVocabulary(facts)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for testers
    while True:
        message, fds, _, _ = socket.recv_fds(orders, 1, 1)
        if not message:
            return
        with suppress(OSError):  # no room for another process: its socket is closed, which tells
            if os.fork() == 0:
                _run_tester(orders, socket.socket(fileno=fds[0]), vocabulary)
        os.close(fds[0])


def _run_tester(
    orders: socket.socket, grammars: socket.socket, vocabulary: GrammarVocabulary
) -> NoReturn:
    """In a process of its own: never returns, whatever happens."""
    try:
        orders.close()
        setproctitle("sgl::grammar tester")
        _limit_this_process()
        grammars.sendall(_number(os.getpid()))
        while True:
            message, fds, _, _ = socket.recv_fds(grammars, 1, 1)
            if not message:
                break
            grammar = msgspec.msgpack.decode(_read_all(fds[0]), type=Grammar)
            outcome = msgspec.msgpack.encode(_try_out(grammar, vocabulary))
            grammars.sendall(_number(len(outcome)) + outcome)
    finally:
        os._exit(0)


def _limit_this_process() -> None:
    die_with_parent(os.getppid())
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


def _try_out(grammar: Grammar, vocabulary: GrammarVocabulary) -> Outcome:
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    begun = time.process_time()
    text = problem = ""
    try:
        text = translate(grammar, vocabulary.json_space)
        CompiledGrammar(grammar.kind, text, vocabulary)
    except InvalidRequestError as error:
        text, problem = "", str(error)
    took_s = time.process_time() - begun
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return Outcome(text, problem, took_s)


def _read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()


def _number(value: int) -> bytes:
    return value.to_bytes(NUMBER_BYTES, "little")


if __name__ == "__main__":
    die_with_parent(int(sys.argv[3]))
    main(int(sys.argv[1]), int(sys.argv[2]))
