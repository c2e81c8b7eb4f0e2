"""`/generate` bodies to calls and answers to JSON, without a server."""

from __future__ import annotations

from array import array
from typing import Any

import orjson
import pytest
from fakes import LetterTokenizer
from hypothesis import given
from hypothesis import strategies as st

from sgl.errors import InvalidRequestError
from sgl.messages import Finish, LogprobOptions, Logprobs, TextDelta, pack
from sgl.protocol.call import Answer
from sgl.protocol.native import generate_request, parse_generate
from sgl.protocol.native_reply import NativeReply

letters = st.text("ab\n\0é😀", max_size=5)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | letters,
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(letters, children, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = [
    "text",
    "input_ids",
    "sampling_params",
    "rid",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "return_text_in_logprobs",
    "stream",
    "cache_salt",
]


def answer(**fields: Any) -> Answer:
    return Answer(**({"index": 0, "rid": "r", "prompt_ids": array("i", [10, 11, 12])} | fields))


def delta(text: str, ids: list[int], **fields: Any) -> TextDelta:
    return TextDelta(1, text, pack(ids), **fields)


def reply(is_disjoint: bool = False, **fields: Any) -> NativeReply:
    request = generate_request({"text": "a"} | fields)
    return NativeReply(request, LetterTokenizer(), is_disjoint=is_disjoint)


def test_one_text_is_one_prompt_and_no_array() -> None:
    request = parse_generate(b'{"text": "hello", "unknown": {"field": 1}}')
    assert [prompt.prompt for prompt in request.call.prompts] == ["hello"]
    assert not request.is_array
    assert request.call.prompts[0].sampling.max_new_tokens == 128
    assert not request.call.prompts[0].is_length_explicit


def test_a_list_is_a_batch_with_a_value_for_each_prompt() -> None:
    request = generate_request(
        {
            "input_ids": [[1, 2], [3]],
            "sampling_params": [{"max_new_tokens": 1}, {"temperature": 0}],
            "rid": ["x", "y"],
            "return_logprob": [True, False],
            "logprob_start_len": 0,
            "top_logprobs_num": [2, 0],
        }
    )
    first, second = request.call.prompts
    assert request.is_array
    assert [first.prompt, second.prompt] == [array("i", [1, 2]), array("i", [3])]
    assert [first.rid, second.rid] == ["x", "y"]
    assert first.logprobs == LogprobOptions(start_len=0, top_num=2)
    assert second.logprobs is None
    assert [first.is_length_explicit, second.is_length_explicit] == [True, False]


def test_one_list_of_ids_is_one_prompt() -> None:
    request = generate_request({"input_ids": [1, 2, 3]})
    assert len(request.call.prompts) == 1
    assert not request.is_array


def test_several_samples_make_an_array() -> None:
    request = generate_request({"text": "a", "sampling_params": {"n": 3}})
    assert request.is_array
    assert request.call.n == 3


def test_null_means_not_given_and_null_grammars_are_accepted() -> None:
    nothing = dict.fromkeys(FIELDS[1:])
    request = generate_request(
        {"text": "a", **nothing, "sampling_params": {"regex": None, "stop": None}}
    )
    assert request.call.prompts[0].sampling.stop == ()
    assert request.call.prompts[0].grammar is None


def test_each_prompt_of_a_batch_may_have_its_own_grammar() -> None:
    fields = {
        "text": ["a", "b", "c"],
        "sampling_params": [{"regex": "a*"}, {}, {"json_schema": {"type": "object"}}],
    }
    grammars = [prompt.grammar for prompt in generate_request(fields).call.prompts]
    assert [grammar and grammar.kind for grammar in grammars] == ["regex", None, "json_schema"]
    one = generate_request({"text": ["a", "b"], "sampling_params": {"regex": "a*"}})
    assert [prompt.grammar for prompt in one.call.prompts] == [grammars[0]] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "input_ids"),
        ({"text": 5}, "text"),
        ({"text": []}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[]]}, "input_ids"),
        ({"input_ids": [1, [2]]}, "input_ids"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"input_ids": [2**40]}, "input_ids"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": "a", "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a", "b"], "rid": "x"}, "rid"),
        ({"text": "a", "rid": "x" * 300}, "rid"),
        ({"text": "a", "rid": "a\nb"}, "rid"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "n"),
        ({"text": "a", "sampling_params": {"temprature": 1}}, "temprature"),
        ({"text": "a", "sampling_params": {"regex": 3}}, "regex"),
        ({"text": "a", "sampling_params": {"json_schema": "{"}}, "json_schema"),
        ({"text": "a", "sampling_params": {"regex": "a", "json_schema": "{}"}}, "json_schema"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "session_params": {}}, "session_params.id"),
        ({"text": "a", "return_hidden_states": True}, "return_hidden_states"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"text": "a", "sampling_params": {"temperature": "hot"}}, "temperature"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        generate_request(fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"text": NaN}',
        b'{"text": "a", "sampling_params": {"temperature": Infinity}}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": "a", "x": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_a_body_that_is_no_sane_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse_generate(body)


@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_whatever_the_fields_hold_they_are_accepted_or_refused(fields: dict[str, Any]) -> None:
    try:
        request = parse_generate(orjson.dumps(fields))
    except InvalidRequestError:
        return
    assert request.call.prompts


def test_a_stream_is_cumulative() -> None:
    growing, stream = answer(), reply()
    growing.add(delta("he", [1, 2], num_cached=2))
    [first] = stream.progress(growing)
    growing.add(delta("llo", [3], finish=Finish("length", length=3)))
    [last] = stream.progress(growing)
    assert (first["text"], last["text"]) == ("he", "hello")
    assert (first["output_ids"], last["output_ids"]) == ([1, 2], [1, 2, 3])
    assert first["meta_info"]["finish_reason"] is None
    assert last["meta_info"] == {
        "id": "r",
        "finish_reason": {"type": "length", "length": 3},
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "cached_tokens": 2,
    }
    assert "index" not in last


def test_stream_output_gives_disjoint_pieces() -> None:
    growing, stream = answer(), reply(is_disjoint=True)
    growing.add(delta("he", [1, 2]))
    [first] = stream.progress(growing)
    growing.add(delta("llo", [3]))
    [second] = stream.progress(growing)
    assert [first["text"], second["text"]] == ["he", "llo"]
    assert [first["output_ids"], second["output_ids"]] == [[1, 2], [3]]


def test_events_of_a_batch_tell_their_index() -> None:
    growing = answer(index=1)
    growing.add(delta("x", [1]))
    [event] = reply(text=["a", "b"]).progress(growing)
    assert event["index"] == 1


@pytest.mark.parametrize(
    ("finish", "shown"),
    [
        (Finish("stop", matched="\n"), {"type": "stop", "matched": "\n"}),
        (Finish("stop", matched=7), {"type": "stop", "matched": 7}),
        (Finish("length", length=0), {"type": "length", "length": 0}),
        (
            Finish("abort", message="gone", status=499),
            {"type": "abort", "message": "gone", "status_code": 499, "err_type": "AbortError"},
        ),
    ],
)
def test_the_reason_of_the_end_is_an_object(finish: Finish, shown: dict[str, Any]) -> None:
    assert reply().whole([answer(finish=finish)])["meta_info"]["finish_reason"] == shown


def logprobs(values: list[float], ids: list[int]) -> Logprobs:
    packed = array("f", values).tobytes()
    return Logprobs(packed, packed, pack(ids), packed)


def test_logprob_rows_have_one_entry_for_each_token() -> None:
    options = LogprobOptions(start_len=0, top_num=1, token_ids=pack([9]))
    growing, stream = answer(logprob_options=options), reply(return_text_in_logprobs=True)
    growing.add(
        delta(
            "a",
            [97],
            input_logprobs=[logprobs([float("nan"), -1.0, -2.0], [0, 11, 12])],
            output_logprobs=[logprobs([-0.5], [97])],
        )
    )
    stream.progress(growing)
    growing.add(delta("b", [98], output_logprobs=[logprobs([-0.25], [98])]))
    meta = stream.progress(growing)[0]["meta_info"]
    assert meta["input_token_logprobs"] == [
        [None, 10, "\n"],
        [-1.0, 11, "\x0b"],
        [-2.0, 12, "\x0c"],
    ]
    assert meta["output_token_logprobs"] == [[-0.5, 97, "a"], [-0.25, 98, "b"]]
    assert meta["input_top_logprobs"] == [None, [[-1.0, 11, "\x0b"]], [[-2.0, 12, "\x0c"]]]
    assert meta["output_top_logprobs"] == [[[-0.5, 97, "a"]], [[-0.25, 98, "b"]]]
    assert meta["output_token_ids_logprobs"] == [[[-0.5, 9, "\t"]], [[-0.25, 9, "\t"]]]


def test_a_start_in_the_prompt_gives_the_rest_of_it() -> None:
    growing = answer(logprob_options=LogprobOptions(start_len=1))
    growing.add(delta("", [], input_logprobs=[logprobs([-1.0, -2.0], [0, 0])]))
    meta = reply().whole([growing])["meta_info"]
    assert meta["input_token_logprobs"] == [[-1.0, 11, None], [-2.0, 12, None]]
    assert meta["output_token_logprobs"] == []


def test_without_a_start_there_are_no_input_rows() -> None:
    growing = answer(logprob_options=LogprobOptions())
    growing.add(delta("a", [97], output_logprobs=[logprobs([-0.5], [97])]))
    meta = reply().whole([growing])["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert meta["output_token_logprobs"] == [[-0.5, 97, None]]
    assert "output_top_logprobs" not in meta


@given(st.lists(letters, max_size=8))
def test_disjoint_pieces_join_to_the_cumulative_text(pieces: list[str]) -> None:
    growing, stream = answer(), reply(is_disjoint=True)
    told = ""
    for piece in pieces:
        growing.add(delta(piece, [1]))
        told += stream.progress(growing)[0]["text"]
    assert told == "".join(pieces) == growing.text


@pytest.mark.parametrize(
    ("text", "ids", "whole", "num_chars"),
    [
        ("ab", [97, 98], [97, 98], 2),
        ("a", [97, 98], [97], 1),  # a stop string was taken off
        ("ab", [97, 98, 2], [97, 98], 2),  # a token that ends answers is no text
        ("", [2], [], 0),
        ("é", [0xE9], [0xE9], 1),
    ],
)
def test_tokens_that_lie_whole_in_the_text_are_told_at_the_end(
    text: str, ids: list[int], whole: list[int], num_chars: int
) -> None:
    growing, told = answer(), reply(return_token_ids=True)
    growing.add(delta(text, ids))
    assert "text_token_ids" not in told.progress(growing)[0]["meta_info"]
    growing.add(delta("", [], finish=Finish("stop")))
    meta = told.whole([growing])["meta_info"]
    assert meta["prompt_token_ids"] == [10, 11, 12]
    assert (meta["text_token_ids"], meta["text_token_chars"]) == (whole, num_chars)
