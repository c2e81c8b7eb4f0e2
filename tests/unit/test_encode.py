"""Bodies of `/encode` and `/v1/embeddings`, and vectors as they are told."""

from __future__ import annotations

import base64
from array import array
from typing import Any

import numpy as np
import orjson
import pytest

from sgl.errors import AbortedError, InvalidRequestError
from sgl.messages import Finish, TextDelta
from sgl.protocol.call import Answer
from sgl.protocol.encode import EncodeReply, encode_request, parse_encode
from sgl.protocol.openai import Server
from sgl.protocol.openai_embeddings import EmbeddingsReply, parse_embeddings, shortened

SERVER = Server(model_name="vectors", max_prompts=4)
VECTOR = np.array([0.6, 0.0, -0.8, 1e-8], np.float32)


def answer(index: int = 0, vector: np.ndarray | None = VECTOR, **fields: Any) -> Answer:
    made = Answer(index, f"r{index}", array("i", [1, 2, 3]))
    finish = Finish("length") if vector is not None else Finish("abort", status=499)
    data = b"" if vector is None else vector.tobytes()
    made.add(TextDelta(1, "", b"", finish, num_cached=2, vector=data))
    return made


def openai(sizes: Any = (4,), **fields: Any) -> Any:
    return parse_embeddings(orjson.dumps({"input": "a"} | fields), SERVER, sizes)


def test_one_text_is_one_vector_and_no_array() -> None:
    request = parse_encode(b'{"text": "hello", "unknown": 5, "rid": "x", "cache_salt": "s"}')
    [prompt] = request.call.prompts
    assert (prompt.prompt, prompt.rid) == ("hello", "x")
    assert (request.call.wants_vectors, request.call.n, request.call.stream) == (True, 1, False)
    assert (request.call.namespace, request.call.add_special_tokens) == ("s", True)
    shown = EncodeReply(request).whole([answer()])
    assert orjson.loads(orjson.dumps(shown, option=orjson.OPT_SERIALIZE_NUMPY)) == {
        "embedding": [0.6, 0.0, -0.8, 1e-8],
        "meta_info": {
            "id": "r0",
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": 3,
            "cached_tokens": 2,
        },
    }


def test_a_list_is_an_array_in_order() -> None:
    request = encode_request(
        {"input_ids": [[1, 2], [3]], "rid": ["x", "y"], "add_special_tokens": False}
    )
    assert [prompt.rid for prompt in request.call.prompts] == ["x", "y"]
    assert [prompt.prompt.tolist() for prompt in request.call.prompts] == [[1, 2], [3]]
    assert not request.call.add_special_tokens
    first, second = EncodeReply(request, is_plain=True).whole([answer(0), answer(1, -VECTOR)])
    assert first["embedding"] == VECTOR.tolist()
    assert second["embedding"] == (-VECTOR).tolist()


def test_an_aborted_vector_is_null() -> None:
    request = encode_request({"text": ["a", "b"]})
    first, second = EncodeReply(request).whole([answer(0), answer(1, None)])
    assert first["embedding"] is not None
    assert second["embedding"] is None
    assert second["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": ""}, "text holds an empty text"),
        ({"text": ["a", ""]}, "text holds an empty text"),
        ({"text": []}, "must not be an empty list"),
        ({"text": "a", "stream": True}, "comes whole"),
        ({"text": "a", "input_ids": [1]}, "not both"),
        ({}, "must be given"),
        ({"text": ["a"] * 5}, "holds 5 prompts, a request may hold 4"),
        ({"text": ["a", "b"], "rid": "x"}, "rid must be a list"),
        ({"text": "a", "image_data": "x"}, "image_data is not supported"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        encode_request(fields, max_prompts=4)


@pytest.mark.parametrize(
    ("value", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_every_kind_of_input(value: Any, prompts: list[Any]) -> None:
    call = openai(input=value, rid="x").call
    found = [p.prompt if isinstance(p.prompt, str) else p.prompt.tolist() for p in call.prompts]
    assert found == prompts
    assert [p.rid for p in call.prompts] == (["x"] if len(prompts) == 1 else ["x-0", "x-1"])


def test_openai_is_told_order_model_and_usage() -> None:
    reply = EmbeddingsReply(openai(input=["a", "b"], model="mine", user="me"))
    shown = reply.whole([answer(0), answer(1, -VECTOR)])
    assert shown["object"] == "list"
    assert shown["model"] == "mine"
    assert shown["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert [(row["object"], row["index"]) for row in shown["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    np.testing.assert_array_equal(shown["data"][1]["embedding"], -VECTOR)
    assert EmbeddingsReply(openai()).whole([answer()])["model"] == "vectors"


def test_base64_is_the_bytes_of_little_endian_float32() -> None:
    [row] = EmbeddingsReply(openai(encoding_format="base64")).whole([answer()])["data"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), VECTOR)


def test_an_aborted_input_is_an_error() -> None:
    with pytest.raises(AbortedError, match="'r1'") as raised:
        EmbeddingsReply(openai(input=["a", "b"])).whole([answer(0), answer(1, None)])
    assert raised.value.status == 499


def test_the_beginning_of_a_vector_has_length_1_again() -> None:
    vector = np.array([0.3, 0.4, 0.5, np.sqrt(0.5)], np.float32)
    np.testing.assert_allclose(shortened(vector, 2), [0.6, 0.8], rtol=1e-6)
    assert shortened(vector, 2).dtype == np.float32
    assert shortened(vector, 4) is vector
    assert shortened(np.zeros(4, np.float32), 2).tolist() == [0, 0]
    [row] = EmbeddingsReply(openai(range(1, 5), dimensions=1)).whole([answer()])["data"]
    assert row["embedding"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("sizes", "dimensions", "reason"),
    [
        ((4,), 2, "vectors have 4 numbers, and it does not say that they can be shortened"),
        ((4,), 5, "have 4 numbers"),
        ((2, 4), 3, "dimensions can be 2, 4, got 3"),
        (range(1, 5), 5, "must be from 1 to 4, got 5"),
        (range(1, 5), 0, "dimensions must be at least 1, got 0"),
        ((2, 4), 4, None),
        ((2, 4), 2, None),
        ((4,), 4, None),
    ],
)
def test_only_a_model_that_says_so_gives_shorter_vectors(
    sizes: Any, dimensions: int, reason: str | None
) -> None:
    if reason is None:
        assert openai(sizes, dimensions=dimensions).dimensions == dimensions
    else:
        with pytest.raises(InvalidRequestError, match=reason):
            openai(sizes, dimensions=dimensions)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"input": ""}, "input holds an empty text"),
        ({"input": []}, "input must be a text"),
        ({"input": None}, "input must be a string or an array, got null"),
        ({"input": ["a", [1]]}, "mixes texts and token ids"),
        ({"input": ["a"] * 5}, "input holds 5 prompts"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"model": "a\nb"}, "model must be"),
    ],
)
def test_wrong_fields_of_openai_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        openai(**fields)
