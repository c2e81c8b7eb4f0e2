"""The detokenizer between a scheduler and an ingress that are played by the tests."""

from __future__ import annotations

import random
from array import array

import pytest

from sgl.actors.channel import LocalChannel
from sgl.actors.detokenizer import Detokenizer
from sgl.messages import (
    EngineReady,
    Finish,
    Logprobs,
    NewText,
    NewTokens,
    OpenText,
    Reply,
    Stop,
    TextDelta,
    TokenDelta,
    pack,
    unpack,
)
from sgl.text_stream import TextStream

LENGTH = Finish("length", length=9)
ALPHABET = [b"</s>", b"a", b"b", b"ab", b" b", b"\xf0\x9f", b"\x98\x80", b"#", b"##", b"c#"]


class Vocabulary:
    """Ten tokens; id 0 is special."""

    def byte_table(self, skip_special_tokens: bool) -> dict[int, bytes]:
        return dict(enumerate(ALPHABET)) | ({0: b""} if skip_special_tokens else {})


class Bench:
    """A detokenizer with a channel on each side; `room` messages fit the one to the ingress."""

    def __init__(self, vocabulary: Vocabulary | None, room: int | None = None) -> None:
        self.scheduler, self.stops, self.ingress = (
            LocalChannel(),
            LocalChannel(),
            LocalChannel(max_messages=room),
        )
        self.detokenizer = Detokenizer(
            vocabulary, self.scheduler.receiver, self.stops.sender, self.ingress.sender
        )
        self.texts: dict[int, list[TextDelta]] = {}
        self.others: list[Reply | EngineReady] = []

    def turn(self, *messages: OpenText | NewTokens | Reply | EngineReady) -> bool:
        for message in messages:
            self.scheduler.sender.send(message)
        return self.detokenizer.turn()

    def step(self, *deltas: TokenDelta) -> bool:
        return self.turn(NewTokens(list(deltas)))

    def receive(self) -> int:
        """Let the ingress read; how many messages there were."""
        messages = self.ingress.receiver.receive()
        for message in messages:
            if isinstance(message, NewText):
                for delta in message.deltas:
                    self.texts.setdefault(delta.request_id, []).append(delta)
            else:
                self.others.append(message)
        return len(messages)

    def shown(self, request_id: int = 1) -> list[str]:
        self.receive()
        return [delta.text for delta in self.texts.get(request_id, [])]

    def ids(self, request_id: int = 1) -> list[list[int]]:
        self.receive()
        return [list(unpack(delta.token_ids)) for delta in self.texts.get(request_id, [])]


def tokens(*ids: int, finish: Finish | None = None, request_id: int = 1, **more) -> TokenDelta:
    return TokenDelta(request_id, pack(ids), finish, **more)


def floats(*values: float) -> bytes:
    return array("f", values).tobytes()


@pytest.fixture
def bench() -> Bench:
    return Bench(Vocabulary())


def test_all_text_of_a_turn_leaves_as_one_message(bench):
    bench.turn(OpenText(1), OpenText(2))
    bench.turn(
        NewTokens([tokens(1), tokens(2, request_id=2)]), NewTokens([tokens(3, finish=LENGTH)])
    )
    assert bench.receive() == 1
    assert bench.shown(1) == ["aab"]
    assert bench.shown(2) == ["b"]
    assert bench.texts[1][-1].finish == LENGTH


def test_a_turn_without_work_says_so(bench):
    assert not bench.turn()
    assert bench.turn(OpenText(1))
    assert not bench.turn()
    assert bench.receive() == 0


def test_a_stop_string_ends_the_request_and_the_scheduler_is_told_once(bench):
    bench.turn(OpenText(1, stop=("##",)))
    bench.step(tokens(1, 7))
    bench.step(tokens(8, 1, 1))
    bench.step(tokens(2))
    bench.step(tokens(0, finish=Finish("abort", status=499)))
    assert "".join(bench.shown()) == "a"
    assert bench.ids() == [[1, 7], [8]]
    assert [delta.finish for delta in bench.texts[1]] == [None, Finish("stop", matched="##")]
    assert bench.stops.receiver.receive() == [Stop(1)]
    assert bench.detokenizer.num_streams == 0


def test_a_stop_string_in_the_last_tokens_needs_no_word_to_the_scheduler(bench):
    bench.turn(OpenText(1, stop=("#",)))
    bench.step(tokens(1, 9, 2, finish=LENGTH))
    assert bench.shown() == ["ac"]
    assert bench.ids() == [[1, 9]]
    assert bench.texts[1][0].finish == Finish("stop", matched="#")
    assert bench.stops.receiver.receive() == []


@pytest.mark.parametrize(("no_stop_trim", "text"), [(False, "a"), (True, "ab")])
def test_a_stop_token_is_reported_but_not_shown_when_trimmed(bench, no_stop_trim, text):
    bench.turn(OpenText(1, no_stop_trim=no_stop_trim))
    bench.step(tokens(1, 2, finish=Finish("stop", matched=2)))
    assert bench.shown() == [text]
    assert bench.ids() == [[1, 2]]
    assert bench.texts[1][0].finish == Finish("stop", matched=2)


def test_special_tokens_are_skipped_for_each_request_as_it_asked(bench):
    bench.turn(OpenText(1), OpenText(2, skip_special_tokens=False))
    bench.step(tokens(1, 0, finish=LENGTH), tokens(1, 0, finish=LENGTH, request_id=2))
    assert bench.shown(1) == ["a"]
    assert bench.shown(2) == ["a</s>"]


def test_log_probabilities_after_the_stop_string_are_dropped(bench):
    bench.turn(OpenText(1, stop=("#",)))
    logprobs = Logprobs(
        values=floats(-1, -2, -3),
        top_values=floats(-1, -9, -2, -9, -3, -9),
        top_ids=pack([1, 4, 7, 4, 2, 4]),
        chosen_values=floats(-4, -5, -6),
    )
    bench.step(tokens(1, 7, 2, output_logprobs=logprobs, input_logprobs=logprobs, num_cached=5))
    bench.receive()
    [delta] = bench.texts[1]
    assert delta.output_logprobs == [
        Logprobs(
            values=floats(-1, -2),
            top_values=floats(-1, -9, -2, -9),
            top_ids=pack([1, 4, 7, 4]),
            chosen_values=floats(-4, -5),
        )
    ]
    assert delta.input_logprobs == [logprobs]
    assert delta.num_cached == 5


def test_text_is_sent_every_so_many_tokens_and_at_the_end(bench):
    bench.turn(OpenText(1, interval=3))
    for step in range(7):
        bench.step(tokens(1, num_cached=4 if step == 0 else 0))
    bench.step(tokens(2, finish=LENGTH))
    assert bench.shown() == ["aaa", "aaa", "ab"]
    assert [delta.num_cached for delta in bench.texts[1]] == [4, 4, 4]


def test_interval_zero_sends_everything_at_the_end(bench):
    bench.turn(OpenText(1, interval=0))
    for _ in range(20):
        bench.step(tokens(1, output_logprobs=Logprobs(values=floats(-1))))
    assert bench.shown() == []
    bench.step(TokenDelta(1, b"", Finish("abort", message="gone", status=499)))
    assert bench.shown() == ["a" * 20]
    assert bench.texts[1][0].output_logprobs == [Logprobs(values=floats(-1))] * 20
    assert bench.texts[1][0].finish.message == "gone"


def test_without_a_tokenizer_only_ids_pass_through():
    bench = Bench(None)
    bench.turn(OpenText(1, stop=("a",)))
    bench.step(tokens(1, 2), tokens(7, request_id=9))
    bench.step(tokens(99, finish=Finish("stop", matched=99)))
    assert bench.shown() == ["", ""]
    assert bench.ids() == [[1, 2], [99]]


def test_a_full_ingress_gets_everything_later_in_larger_pieces():
    bench = Bench(Vocabulary(), room=1)
    bench.turn(OpenText(1))
    for _ in range(5):
        bench.step(tokens(1))
    assert bench.detokenizer.is_blocked
    assert not bench.turn()
    bench.receive()
    bench.step(tokens(2, finish=LENGTH))
    assert bench.shown() == ["a", "aaaab"]
    assert not bench.detokenizer.is_blocked


def test_a_reply_waits_behind_text_that_could_not_be_sent():
    bench = Bench(Vocabulary(), room=1)
    ready = EngineReady(max_total_tokens=10, max_request_tokens=9)
    bench.turn(ready, OpenText(1))
    bench.step(tokens(1, finish=LENGTH))
    bench.turn(Reply(1, ok=True, text="done"))
    while bench.receive() or bench.turn():
        pass
    assert bench.others == [ready, Reply(1, ok=True, text="done")]
    assert bench.shown() == ["a"]


def test_a_scheduler_that_takes_no_message_is_told_of_the_stop_later():
    bench = Bench(Vocabulary())
    bench.stops = LocalChannel(max_messages=1)
    bench.detokenizer = Detokenizer(
        Vocabulary(), bench.scheduler.receiver, bench.stops.sender, bench.ingress.sender
    )
    bench.turn(OpenText(1, stop=("#",)), OpenText(2, stop=("#",)))
    bench.step(tokens(7), tokens(7, request_id=2))
    assert bench.stops.receiver.receive() == [Stop(1)]
    assert bench.turn()
    assert bench.stops.receiver.receive() == [Stop(2)]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_pace_every_request_gets_its_whole_text_in_order(seed):
    rng = random.Random(seed)
    bench = Bench(Vocabulary(), room=rng.choice([1, 2, None]))
    asked = {request_id: _random_request(rng, request_id) for request_id in range(30)}
    bench.turn(*(opened for opened, _ in asked.values()))
    left = {request_id: list(ids) for request_id, (_, ids) in asked.items()}
    while left or bench.detokenizer.is_blocked:
        deltas = [
            _next_delta(rng, left, it) for it in rng.sample(sorted(left), (len(left) + 1) // 2)
        ]
        bench.step(*deltas) if deltas else bench.turn()
        if rng.random() < 0.3:
            bench.receive()
    bench.receive()
    for request_id, (opened, ids) in asked.items():
        _check(opened, ids, bench.texts[request_id])
    assert bench.detokenizer.num_streams == 0


def _random_request(rng: random.Random, request_id: int) -> tuple[OpenText, list[int]]:
    stop = tuple(rng.sample(["#", "##", "ab a", "b#", "zz", "😀a"], rng.choice([0, 1, 3])))
    opened = OpenText(
        request_id,
        stop=stop,
        skip_special_tokens=rng.random() < 0.5,
        no_stop_trim=rng.random() < 0.5,
        interval=rng.randrange(9),
    )
    weights = [1, 9, 9, 9, 9, 3, 3, 1, 1, 1]
    return opened, rng.choices(range(len(ALPHABET)), weights, k=rng.randrange(1, 60))


def _next_delta(rng: random.Random, left: dict[int, list[int]], request_id: int) -> TokenDelta:
    count = rng.choice([1, 1, 1, 4])
    ids, rest = left[request_id][:count], left[request_id][count:]
    left[request_id] = rest
    if not rest:
        del left[request_id]
    logprobs = Logprobs(values=floats(*ids))
    finish = None if rest else LENGTH
    return tokens(*ids, finish=finish, request_id=request_id, output_logprobs=logprobs)


def _check(opened: OpenText, ids: list[int], deltas: list[TextDelta]) -> None:
    """The deltas together say what one look at all tokens says."""
    whole = TextStream(Vocabulary(), opened.stop, opened.skip_special_tokens, opened.no_stop_trim)
    assert "".join(delta.text for delta in deltas) == whole.push(ids) + whole.finish()
    kept = ids[: whole.num_tokens]
    assert [it for delta in deltas for it in unpack(delta.token_ids)] == kept
    values = b"".join(part.values for delta in deltas for part in delta.output_logprobs)
    assert values == floats(*kept)
    assert all(delta.finish is None for delta in deltas[:-1])
    expected = LENGTH if whole.matched is None else Finish("stop", matched=whole.matched)
    assert deltas[-1].finish == expected
    if opened.interval:
        assert all(len(unpack(delta.token_ids)) >= opened.interval for delta in deltas[:-1])
    else:
        assert len(deltas) == 1


def test_a_vector_passes_unchanged_and_whole(bench):
    vector, left = floats(0.25, -1.0, 3.0), Finish("abort", message="left", status=499)
    bench.turn(OpenText(1, interval=0), OpenText(2, interval=0))
    bench.turn(
        NewTokens(
            [tokens(finish=LENGTH, vector=vector, num_cached=4), tokens(finish=left, request_id=2)]
        )
    )
    bench.receive()
    [delta], [gone] = bench.texts[1], bench.texts[2]
    assert (delta.vector, delta.finish, delta.num_cached) == (vector, LENGTH, 4)
    assert (delta.text, delta.token_ids) == ("", b"")
    assert (gone.vector, gone.finish) == (b"", left)
    assert bench.detokenizer.num_streams == 0
