"""Grammars made to hang, crash or slow down the server: each is answered, and streams go on.

How fast, is recorded; with `--full`, on a machine that has nothing else to do, it is also asserted.
"""

from __future__ import annotations

import http.client
import itertools
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from evil_grammars import EvilGrammar, evil_grammars
from pipeline.conftest import STREAMS
from pipeline.server import Server, Stream

from sgl.constrained.grammar import parse_grammar
from sgl.constrained.matcher import CompiledGrammar, GrammarVocabulary, VocabularyFacts
from sgl.model_files import demo_model_path
from sgl.sampling_params import GrammarKind
from sgl.tokenizer import Tokenizer

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(600)]

ANSWERED_AFTER_S = 6.0
MOST_TIMES_SLOWER = 2.0  # the 99th percentile of a stream's time between tokens
MOST_TIMES_SLOWER_AT_ONCE = 4.0  # eight may keep both cores busy at once
NUM_ROUNDS = 3
TAME_S = 3.0
EVIL = list(evil_grammars())

Named = tuple[str, bytes]  # of a request: a name and the body
Record = Callable[[str, object], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """Of the server to one grammar."""

    name: str
    status: int
    body: Any
    took_s: float

    def is_fine(self, refusals: tuple[int, ...] = (400,)) -> bool:
        return self.status == 200 or (self.status in refusals and self.says_why)

    @property
    def says_why(self) -> bool:
        return len(self.body["error"]["message"].split()) >= 3

    def __str__(self) -> str:
        ids = self.body.get("output_ids", [])
        said = f"{len(ids)} tokens" if self.status == 200 else self.body["error"]["message"]
        return f"{self.took_s:6.2f} s  {self.status}  {self.name}: {said:.120}"


class Neighbour:
    """A stream that is begun anew when it ends, while this is entered."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._is_over = threading.Event()
        self._streams: list[Stream] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def gaps_s(self) -> list[float]:
        """Between its tokens."""
        assert {stream.end for stream in self._streams} == {"complete"}
        return [
            later - earlier
            for stream in self._streams
            for earlier, later in itertools.pairwise(stream.times_s)
        ]

    def _run(self) -> None:
        while not self._is_over.is_set():
            self._streams.append(Stream(self._server, prompt="Once upon a time", num_tokens=50))
            self._streams[-1].join()


@dataclass(slots=True)
class Comparison:
    """Times between the tokens of a stream beside tame and beside evil grammars, taken in turns:
    who else needs the machine needs it in both."""

    tame_s: list[float] = field(default_factory=list)
    evil_s: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def times_slower(self) -> float:
        return slow_s(self.evil_s) / slow_s(self.tame_s)

    def __str__(self) -> str:
        return (
            f"99 % of {len(self.evil_s)} tokens came within {slow_s(self.evil_s) * 1000:.0f} ms, "
            f"beside tame grammars, of {len(self.tame_s)}, within {slow_s(self.tame_s) * 1000:.0f} "
            f"ms: {self.times_slower:.2f} times as long"
        )


def slow_s(gaps_s: list[float]) -> float:
    return float(np.percentile(gaps_s, 99))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--num-cpu-threads", "1", "--random-seed", "0"]
    with Server(flags, tmp_path_factory.mktemp("evil")) as server:
        ask_all(server, [("tame", body_of(GrammarKind.REGEX, "warm"))])
        yield server


@pytest.fixture(scope="module")
def vocabulary() -> GrammarVocabulary:
    tokenizer = Tokenizer.load(demo_model_path())
    return GrammarVocabulary(
        VocabularyFacts(tokenizer.to_json(), tokenizer.vocab_size, tuple(tokenizer.eos_ids))
    )


def body_of(kind: GrammarKind, source: Any) -> bytes:
    sampling = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True, kind: source}
    return json.dumps({"text": "An answer: ", "sampling_params": sampling}).encode()


TAME = [("tame", body_of(GrammarKind.REGEX, rf"[a-z]{{3,9}} \d{{{num}}}")) for num in range(1, 9)]


def named_bodies(evil: list[EvilGrammar]) -> list[Named]:
    return [(one.name, body_of(one.kind, one.source)) for one in evil]


def ask(connection: http.client.HTTPConnection, name: str, body: bytes) -> Answer:
    begun = time.monotonic()
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answered = response.read()
    return Answer(name, response.status, json.loads(answered), time.monotonic() - begun)


def ask_all(server: Server, bodies: list[Named]) -> list[Answer]:
    """One after the other, on one connection."""
    connection = server.connection()
    try:
        return [ask(connection, name, body) for name, body in bodies]
    finally:
        connection.close()


def ask_at_once(server: Server, clients: list[list[Named]]) -> list[Answer]:
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda mine=mine: answers.extend(ask_all(server, mine)))
        for mine in clients
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == sum(map(len, clients)), "a connection was dropped"
    return answers


def compare(server: Server, tame: list[Named], evil: list[Named], num_clients: int) -> Comparison:
    """All grammars, in rounds; those of a round come from so many clients at once."""
    found = Comparison()
    in_round = -(-len(evil) // NUM_ROUNDS)
    for begin in range(0, len(evil), in_round):
        end_s = time.monotonic() + TAME_S
        with Neighbour(server) as neighbour:
            while time.monotonic() < end_s:
                ask_at_once(server, share(tame, num_clients))
        found.tame_s += neighbour.gaps_s()
        with Neighbour(server) as neighbour:
            mine = share(evil[begin : begin + in_round], num_clients)
            found.answers += ask_at_once(server, mine)
        found.evil_s += neighbour.gaps_s()
    return found


def share(bodies: list[Named], num_clients: int) -> list[list[Named]]:
    return [bodies[number::num_clients] for number in range(num_clients)]


def is_beginning(evil: EvilGrammar, answer: Answer, vocabulary: GrammarVocabulary) -> bool:
    """Whether the answer can go on to match, or matches where it has ended."""
    matcher = CompiledGrammar.of(parse_grammar(evil.kind, evil.source), vocabulary).matcher()
    finish = answer.body["meta_info"]["finish_reason"]
    ids = answer.body["output_ids"]
    is_end_token = isinstance(finish.get("matched"), int)
    if not matcher.take(ids[:-1] if is_end_token else ids):
        return False
    return finish["type"] == "length" or matcher.may_end


def test_each_is_answered_and_a_stream_goes_on(
    server: Server, vocabulary: GrammarVocabulary, is_full: bool, record_property: Record
) -> None:
    actors = server.actors()
    evil = EVIL if is_full else EVIL[1::2] + EVIL[-1:]
    assert len(evil) >= 40
    found = compare(server, TAME, named_bodies(evil), num_clients=1)
    for answer in found.answers:
        record_property(STREAMS, answer)
    record_property(STREAMS, f"one by one: {found}")
    faults = [str(answer) for answer in found.answers if not answer.is_fine()]
    assert not faults, "\n".join(faults)
    for one, answer in zip(evil, found.answers, strict=True):
        if answer.status == 200:
            assert is_beginning(one, answer, vocabulary), answer
    if is_full:
        assert max(answer.took_s for answer in found.answers) <= ANSWERED_AFTER_S
        assert found.times_slower <= MOST_TIMES_SLOWER
    check_serves_as_before(server, actors)


def test_eight_clients_at_once_are_answered_and_a_stream_goes_on(
    server: Server, is_full: bool, record_property: Record
) -> None:
    """A server that has too many at once may say so, with 503."""
    actors = server.actors()
    evil = EVIL if is_full else EVIL[::3]
    found = compare(server, TAME, named_bodies(evil), num_clients=8)
    record_property(STREAMS, f"from 8 clients: {found}")
    statuses = Counter(answer.status for answer in found.answers)
    slowest = max(found.answers, key=lambda answer: answer.took_s)
    record_property(STREAMS, f"statuses: {dict(statuses)}; the slowest: {slowest}")
    faults = [str(answer) for answer in found.answers if not answer.is_fine((400, 503))]
    assert not faults, "\n".join(faults)
    if is_full:
        assert slowest.took_s <= ANSWERED_AFTER_S
        assert found.times_slower <= MOST_TIMES_SLOWER_AT_ONCE
    check_serves_as_before(server, actors)


def check_serves_as_before(server: Server, actors: dict[str, int]) -> None:
    [answer] = ask_all(server, [("tame", body_of(GrammarKind.REGEX, "(yes|no), [a-z]{5}"))])
    assert re.fullmatch("(yes|no), [a-z]{5}", answer.body["text"])
    assert server.actors() == actors
    assert server.is_ready
    assert "Traceback" not in server.log
