"""However tokens arrive, a stream shows the text of all of them and no part of a stop string."""

from __future__ import annotations

import codecs
import random
from array import array

import pytest

from sgl.text_stream import StopStrings, TextStream

NUM_CASES = 20_000
END = 0  # a special token of the fakes
WORDS = [
    *"ab\n #",
    "abab",
    "日本",
    "語",
    "한",
    "é",
    "e\u0301",
    "👩\u200d👧",
    "🏳️\u200d🌈",
    "###",
    "\ufffd",
    "\u0000",
    "User:",
]
INVALID = [b"\x80", b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x91", b"\xed\xa0\x80", b"\xc0\xaf"]


class Vocabulary:
    """A tokenizer of any byte strings; id 0 is special."""

    def __init__(self, tokens: list[bytes]) -> None:
        self._table = dict(enumerate([b"</s>", *tokens]))

    def byte_table(self, skip_special_tokens: bool) -> dict[int, bytes]:
        return self._table | {END: b""} if skip_special_tokens else self._table


def batch_text(data: list[bytes], stop: tuple[str, ...], no_stop_trim: bool) -> tuple[str, int]:
    """The text of all tokens at once, and how many of them belong to it: slow and simple."""
    for num_tokens in range(1, len(data) + 1):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        cut = _cut(decoder.decode(b"".join(data[:num_tokens])), stop, no_stop_trim)
        if cut is not None:
            return cut, num_tokens
    text = b"".join(data).decode("utf-8", "replace")
    cut = _cut(text, stop, no_stop_trim)
    return (text if cut is None else cut), len(data)


def _cut(text: str, stop: tuple[str, ...], no_stop_trim: bool) -> str | None:
    found = [(text.find(it), -len(it)) for it in stop if it in text]
    if not found:
        return None
    start, minus_len = min(found)
    return text[: start - minus_len] if no_stop_trim else text[:start]


def random_data(rng: random.Random) -> bytes:
    parts = [rng.choice(WORDS).encode() for _ in range(rng.randrange(1, 12))]
    for _ in range(rng.choice([0, 0, 1, 3])):
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(INVALID))
    return b"".join(parts)


def random_pieces(rng: random.Random, data: bytes) -> list[bytes]:
    longest = rng.choice([1, 1, 3, 8])
    pieces, start = [], 0
    while start < len(data):
        end = start + rng.randint(1, longest)
        pieces.append(data[start:end])
        start = end
    return pieces


def random_stops(rng: random.Random, data: bytes) -> tuple[str, ...]:
    """Some cut from the text itself, so that they are really found."""
    text = data.decode("utf-8", "replace")
    stops = []
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        start = rng.randrange(len(text))
        stop = text[start : start + rng.randint(1, 5)]
        stops.append(stop if rng.random() < 0.6 else stop + rng.choice(WORDS))
    return tuple(stops)


def pushed(stream: TextStream, ids: list[int], rng: random.Random) -> list[str]:
    """What the stream shows when the tokens come in chunks of any size."""
    shown, start = [], 0
    while start < len(ids):
        end = start + rng.choice([1, 1, 2, 5])
        shown.append(stream.push(array("i", ids[start:end])))
        start = end
    return [*shown, stream.finish()]


def stream_of(data: list[bytes], *stop: str, **options: bool) -> tuple[TextStream, list[int]]:
    return TextStream(Vocabulary(data), stop, **options), list(range(1, len(data) + 1))


def shown_bytewise(text: str, *stop: str) -> list[str]:
    stream, ids = stream_of([bytes([byte]) for byte in text.encode()], *stop)
    return [*(stream.push([it]) for it in ids), stream.finish()]


def test_any_tokens_in_any_chunks_show_the_batch_text():
    rng = random.Random(20_000)
    for case in range(NUM_CASES):
        data = random_data(rng)
        pieces, stop = random_pieces(rng, data), random_stops(rng, data)
        no_stop_trim = rng.random() < 0.3
        expected, num_tokens = batch_text(pieces, stop, no_stop_trim)
        stream, ids = stream_of(pieces, *stop, no_stop_trim=no_stop_trim)
        shown = pushed(stream, ids, rng)
        assert "".join(shown) == expected, (case, pieces, stop)
        assert stream.num_tokens == num_tokens, (case, pieces, stop)
        was_cut = _cut(data_text(pieces, stream), stop, True) is not None
        assert (stream.matched is not None) == was_cut, (case, pieces, stop)


def data_text(pieces: list[bytes], stream: TextStream) -> str:
    return b"".join(pieces[: stream.num_tokens]).decode("utf-8", "replace")


def test_exactly_what_could_begin_a_stop_string_is_held_back():
    rng = random.Random(7)
    for _ in range(2000):
        data = random_data(rng)
        pieces, stop = random_pieces(rng, data), random_stops(rng, data)
        stream, ids = stream_of(pieces, *stop)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = shown = ""
        for token_id, piece in zip(ids, pieces, strict=True):
            text += decoder.decode(piece)
            shown += stream.push([token_id])
            if stream.matched is None:
                begun = [it[:size] for it in stop for size in range(1, len(it))]
                held_len = max((len(it) for it in begun if text.endswith(it)), default=0)
                assert shown == text[: len(text) - held_len], (pieces, stop)


def test_half_a_character_is_held_back_and_shown_whole():
    assert shown_bytewise("a👩é") == ["a", "", "", "", "👩", "", "é", ""]


def test_a_character_that_never_ends_is_shown_as_one_replacement():
    stream, _ = stream_of([b"ok\xf0\x9f\x91"])
    assert stream.push([1]) == "ok"
    assert stream.finish() == "\ufffd"


def test_an_invalid_byte_does_not_hold_back_what_follows():
    stream, _ = stream_of([b"\xf0", b"\x80", b"a"])
    assert [stream.push([1]), stream.push([2]), stream.push([3])] == ["", "\ufffd\ufffd", "a"]


def test_a_stop_string_can_begin_in_one_token_and_end_inside_another():
    stream, ids = stream_of([b"Hi U", b"ser", b": more", b"later"], "User:")
    assert [stream.push([it]) for it in ids] == ["Hi ", "", "", ""]
    assert stream.matched == "User:"
    assert stream.num_tokens == 3
    assert stream.finish() == ""


def test_the_earliest_stop_string_wins_and_of_several_there_the_longest():
    stream, ids = stream_of([b"x abcd bc"], "bc", "ab", "abcd")
    assert stream.push(ids) == "x "
    assert stream.matched == "abcd"


def test_a_stop_string_inside_another_one_ends_the_text_when_its_token_comes():
    stream, ids = stream_of([b"xab", b"c", b"d"], "abcd", "bc")
    assert stream.push(ids) == "xa"
    assert (stream.matched, stream.num_tokens) == ("bc", 2)


def test_a_false_start_is_shown_as_soon_as_it_is_known_to_be_one():
    assert shown_bytewise("aaab aac", "aab") == ["", "", "a", "", "", "", "", "", ""]
    assert shown_bytewise("aaca", "aab") == ["", "", "aac", "", "a"]


def test_the_stop_string_is_kept_when_trimming_is_off():
    stream, ids = stream_of([b"a.", b"###b"], "###", no_stop_trim=True)
    assert stream.push(ids) == "a.###"


def test_special_tokens_leave_no_text_unless_they_are_wanted():
    data = [b"\xf0\x9f", b"\x98\x80"]
    skipping = TextStream(Vocabulary(data))
    assert skipping.push([1, END, 2]) + skipping.finish() == "😀"
    showing = TextStream(Vocabulary(data), skip_special_tokens=False)
    assert showing.push([1, END, 2]) + showing.finish() == "\ufffd</s>\ufffd\ufffd"


@pytest.mark.parametrize(("no_stop_trim", "expected"), [(False, "a"), (True, "ab")])
def test_a_stop_token_is_counted_but_shown_only_untrimmed(no_stop_trim, expected):
    stream, _ = stream_of([b"a", b"b"], "zz", no_stop_trim=no_stop_trim)
    assert stream.push([1]) + stream.finish(stop_id=2) == expected
    assert stream.num_tokens == 2


def test_a_replacement_character_at_the_end_can_complete_a_stop_string():
    stream, ids = stream_of([b"a", b"b\xf0\x9f"], "b\ufffd")
    assert stream.push(ids) + stream.finish() == "a"
    assert stream.matched == "b\ufffd"


def test_unknown_ids_leave_no_text():
    stream, _ = stream_of([b"a"], "b")
    assert stream.push([-1, 1, 10**9]) + stream.finish() == "a"
    assert stream.num_tokens == 3


def test_the_machine_holds_the_longest_prefix_of_any_stop_string():
    rng = random.Random(3)
    for _ in range(500):
        stops = tuple("".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(3))
        text = "".join(rng.choices("ab", k=20))
        machine, state = StopStrings(stops), 0
        for end, char in enumerate(text, start=1):
            state = machine.step(state, char)
            ends = [
                text[:end].endswith(it[:size]) * size for it in stops for size in range(len(it) + 1)
            ]
            assert machine.depth[state] == max(ends)
            found = [it for it in stops if text[:end].endswith(it)]
            assert machine.ended[state] == max(found, key=len, default=None)


def test_what_is_held_back_stays_small_however_long_the_text_is():
    """A token that never becomes a character, and text that is always about to stop."""
    broken, _ = stream_of([b"\xf0"])
    stopping, _ = stream_of([b"a"], "a" * 255 + "b")
    for _ in range(10_000):
        broken.push([1])
        stopping.push([1])
    assert broken.finish() == "\ufffd"
    assert stopping.finish() == "a" * 255


def test_a_special_token_that_is_kept_leaves_text_and_the_others_none():
    class Specials(Vocabulary):
        def byte_table(self, skip_special_tokens):
            table = super().byte_table(False)
            return {key: data for key, data in table.items() if key > 2 or not skip_special_tokens}

    vocabulary = Specials([b"<call>", b"<end>", b"a"])
    stream = TextStream(vocabulary, kept_ids=(1, 99))
    assert stream.push([0, 1, 3, 2]) + stream.finish() == "<call>a"
    stream = TextStream(vocabulary, skip_special_tokens=False, kept_ids=(1,))
    assert stream.push([0, 1, 3, 2]) + stream.finish() == "</s><call>a<end>"
    stream = TextStream(vocabulary, stop=("<call>a",), kept_ids=(1,))
    assert stream.push([3, 1, 3, 2]) + stream.finish() == "a"
