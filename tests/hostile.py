"""Requests that must be refused: every field with every kind of wrong value.

`hostile_requests(vocab_size)` gives all that ask for text, `hostile_vector_requests` those that ask
for vectors; a server answers each with a 4xx JSON error at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
ENCODE, CLASSIFY, EMBEDDINGS = "/encode", "/classify", "/v1/embeddings"


@dataclass(frozen=True, slots=True)
class HostileRequest:
    name: str
    path: str
    body: bytes
    content_type: str = "application/json"


MESSAGES = [{"role": "user", "content": "hi"}]
GOOD: dict[str, dict[str, Any]] = {
    GENERATE: {"text": "hi", "sampling_params": {"max_new_tokens": 4}},
    COMPLETIONS: {"model": "default", "prompt": "hi", "max_tokens": 4},
    CHAT: {"model": "default", "messages": MESSAGES, "max_tokens": 4},
}
VECTORS: dict[str, dict[str, Any]] = {
    ENCODE: {"text": "hi"},
    CLASSIFY: {"text": "hi"},
    EMBEDDINGS: {"model": "default", "input": "hi"},
}
ALL_GOOD = GOOD | VECTORS

HUGE = 2**63
SAMPLING: dict[str, list[Any]] = {
    "max_new_tokens": ["many", -1, 1.5, True, [1], {}, HUGE, 10**9],
    "min_new_tokens": ["x", -1, HUGE],
    "temperature": ["hot", -0.1, -1, 1e300, [], True],
    "top_p": ["x", 0, -1, 1.01, []],
    "top_k": ["x", 0, -2, 1.5, []],
    "min_p": ["x", -0.1, 1.1],
    "frequency_penalty": ["x", -2.1, 2.1, 1e308],
    "presence_penalty": ["x", -2.1, 2.1],
    "repetition_penalty": ["x", 0, -1, 2.1],
    "stop": [5, {}, [5], [""], "", ["x"] * 17, "x" * 257, [["x"]], ["x"] * 1_000_000],
    "stop_token_ids": ["x", [-1], [2**31], [2**63], [1.5], {}, ["a"]],
    "logit_bias": [
        5,
        [1],
        {"-1": 1},
        {"abc": 1},
        {"1": "x"},
        {"1": 101},
        {"1": -101},
        {"2147483648": 1},
    ],
    "seed": ["x", 1.5, HUGE * 2, []],
    "ignore_eos": ["yes", 2],
    "skip_special_tokens": ["no", 2],
    "spaces_between_special_tokens": ["no"],
    "no_stop_trim": ["no", 1],
    "n": [0, -1, 129, 10**9, "x", 1.5, HUGE],
    "regex": [5, {}, "x" * 1_000_001],
    "json_schema": ["{", [], 5, '{"a":' * 10_000],
    "ebnf": [5, {}, "x" * 1_000_001],
    "temprature": [1],
    "__class__": ["x"],
}
NATIVE: dict[str, list[Any]] = {
    "text": [5, True, {}, [], [1], [""], [None], "", 1.5, [["a"]]],
    "sampling_params": [5, "x", [], [{}], [5], True],
    "rid": [5, [], ["a"], {}, "x" * 10_000, "a\r\nb"],
    "return_logprob": ["x", 5, [True]],
    "top_logprobs_num": ["x", [1]],
    "stream": ["yes", 1, []],
    "return_text_in_logprobs": ["yes"],
    "image_data": ["file:///etc/passwd", "http://169.254.169.254/", ["x"]],
    "input_embeds": [[[0.1]], "x"],
    "lora_path": ["x", "../../etc"],
    "session_params": [{}, 5, "x", {"id": ""}, {"id": "x", "who": 1}, {"id": "x", "offset": "1"}],
    "custom_logit_processor": ["gASV"],
    "cache_salt": [5, "", "x" * 1000, "a\x00b"],
}
BAD_IDS: list[Any] = [
    "x",
    5,
    {},
    [],
    [[]],
    [-1],
    [2**31],
    [2**63],
    [1, [2]],
    [[1], 2],
    [1.5],
    [True],
]
LOGPROBS: list[dict[str, Any]] = [
    {"logprob_start_len": -2},
    {"logprob_start_len": 1000},
    {"logprob_start_len": HUGE},
    {"logprob_start_len": "x"},
    {"top_logprobs_num": -1},
    {"top_logprobs_num": 21},
    {"top_logprobs_num": 10**9},
    {"token_ids_logprob": "x"},
    {"token_ids_logprob": [-1]},
    {"token_ids_logprob": [2**40]},
    {"token_ids_logprob": [1, "a"]},
]
BATCHES: list[dict[str, Any]] = [
    {"text": ["a", "b"], "sampling_params": [{}]},
    {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
    {"text": ["a", "b"], "rid": "x"},
    {"text": ["a", "b"], "rid": ["x", "x"]},
    {"text": ["a", ""], "sampling_params": {"max_new_tokens": 4}},
    {"text": ["a", "b"], "return_logprob": [True]},
    {"text": ["a"] * 100_000, "sampling_params": {"max_new_tokens": 4}},
    {"text": ["a"] * 100, "sampling_params": {"n": 128, "max_new_tokens": 4}},
    {"text": "a", "input_ids": [1]},
]
OPENAI: dict[str, list[Any]] = {
    "model": [5, [], "x" * 1000],
    "max_tokens": ["x", -1, 1.5, HUGE],
    "n": [0, -1, 129, 10**9, "x"],
    "temperature": ["hot", -1],
    "top_p": [0, 2, "x"],
    "stop": [5, {}, [5], [""], ["x"] * 17],
    "logit_bias": [5, {"-1": 1}, {"abc": 1}, {"1": 1000}],
    "seed": ["x", 1.5],
    "stream": ["yes", 1],
    "stream_options": [5, {"include_usage": "x"}],
    "frequency_penalty": [3, "x"],
    "regex": [5, {}],
    "ebnf": [5, {}],
    "guided_json": ["{", 5, []],
    "lora_path": ["x"],
}
COMPLETION_ONLY: dict[str, list[Any]] = {
    "prompt": [None, 5, [], [[]], ["a", 1], [1, "a"], [-1], [2**40], "", [""], {}],
    "logprobs": [-1, 21, "x", True],
    "best_of": [5, "x"],
    "suffix": ["x", 5],
    "echo": ["x"],
}
CHAT_ONLY: dict[str, list[Any]] = {
    "messages": [
        None,
        5,
        "hi",
        [],
        [5],
        [{}],
        [{"role": "user"}],
        [{"role": "king", "content": "x"}],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        MESSAGES * 5000,
    ],
    "logprobs": ["x", 5],
    "top_logprobs": [5, -1, "x"],
    "max_completion_tokens": ["x", -1],
    "tools": [[{"type": "function"}], "x", [5], [{"function": {"name": "\n"}}]],
    "tool_choice": ["required", "x", 5, {}, {"function": {"name": "f"}}],
    "parallel_tool_calls": ["x"],
    "response_format": [5, {}, {"type": 5}, {"type": "xml"}, {"type": "json_schema"}],
    "chat_template_kwargs": [5, {"messages": []}, {"self": 1}, {"tools": 1}],
}
ENCODE_FIELDS: dict[str, list[Any]] = {
    "text": [*NATIVE["text"], ["a", ""]],
    "rid": NATIVE["rid"],
    "stream": [True, "yes", 1],
    "cache_salt": NATIVE["cache_salt"],
    "add_special_tokens": ["no", 2],
    "image_data": NATIVE["image_data"],
    "input_embeds": NATIVE["input_embeds"],
    "lora_path": NATIVE["lora_path"],
}
EMBEDDING_FIELDS: dict[str, list[Any]] = {
    "input": [*COMPLETION_ONLY["prompt"], ["a", ""], ["a"] * 100_000, 1.5, True, [None]],
    "model": OPENAI["model"],
    "encoding_format": ["hex", 5, ["float"], ""],
    "dimensions": [0, -1, 3, 10**9, HUGE, 1.5, "x", True],
    "user": [5],
    "rid": [5, [], "x" * 10_000, "a\r\nb"],
    "cache_salt": NATIVE["cache_salt"],
    "add_special_tokens": ["no"],
    "lora_path": ["x"],
}
# body after body for routes that are not about generation; all are wrong
OTHERS: dict[str, list[Any]] = {
    "/open_session": [
        {},
        {"capacity_of_str_len": 0},
        {"capacity_of_str_len": -1},
        {"capacity_of_str_len": "many"},
        {"capacity_of_str_len": 1e300},
        {"capacity_of_str_len": 10, "session_id": ""},
        {"capacity_of_str_len": 10, "session_id": "a\r\nb"},
        {"capacity_of_str_len": 10, "session_id": "x" * 1000},
        [],
    ],
    "/close_session": [{}, {"session_id": 5}, {"session_id": ""}, "x"],
    "/update_weights_from_disk": [
        {},
        {"model_path": ""},
        {"model_path": 5},
        {"model_path": "/nowhere/at/all"},
        {"model_path": "/etc/passwd"},
        {"model_path": "a\u0000b"},
        {"model_path": "x", "load_format": "pt"},
        {"model_path": "x" * 5000},
    ],
    "/get_weights_by_name": [
        {},
        {"name": 5},
        {"name": ""},
        {"name": "no.such.weight"},
        {"name": "x" * 4096},
        {"name": "model.norm.weight", "truncate_size": 0},
        {"name": "model.norm.weight", "truncate_size": HUGE},
        {"name": "model.norm.weight", "truncate_size": "x"},
    ],
    "/configure_logging": [
        {"log_requests": "yes"},
        {"log_requests_level": 3},
        {"log_requests_level": -1},
        {"dump_requests_folder": 5},
        {"dump_requests_folder": "/proc/nowhere"},
        {"dump_requests_folder": "/etc/passwd"},
        {"dump_requests_folder": "a\u0000b"},
        {"dump_requests_threshold": 0},
        {"dump_requests_threshold": HUGE},
    ],
}
NESTED = b"[" * 50_000 + b"]" * 50_000


def hostile_requests(vocab_size: int, max_chars: int = 5_000_000) -> Iterator[HostileRequest]:
    """All of them; `max_chars` is a text that no context holds."""
    for path in GOOD:
        yield from _broken_bodies(path)
        yield from _too_long(path, max_chars)
    yield from _generate_requests(vocab_size)
    for path, special in ((COMPLETIONS, COMPLETION_ONLY), (CHAT, CHAT_ONLY)):
        yield from _with_fields(path, OPENAI)
        yield from _with_fields(path, special)
    for path, bodies in OTHERS.items():
        for body in bodies:
            yield _request(path, "body", body, body)


def hostile_vector_requests(
    vocab_size: int, max_chars: int = 5_000_000
) -> Iterator[HostileRequest]:
    """To a model whose vectors cannot be given 3 numbers."""
    for path in VECTORS:
        yield from _broken_bodies(path)
        yield from _too_long(path, max_chars)
    for path in (ENCODE, CLASSIFY):
        yield from _with_fields(path, ENCODE_FIELDS)
        for ids in [*BAD_IDS, [vocab_size], [[1], [vocab_size + 7]]]:
            yield _request(path, "input_ids", ids, {"input_ids": ids})
        yield _request(path, "both", {}, {"text": "a", "input_ids": [1]})
        yield _request(path, "nothing", {}, {})
    yield from _with_fields(EMBEDDINGS, EMBEDDING_FIELDS)
    for ids in ([vocab_size], [[1], [vocab_size + 7]]):
        yield _request(EMBEDDINGS, "input", ids, {"input": ids})
    yield _request(EMBEDDINGS, "nothing", {}, {})


def _generate_requests(vocab_size: int) -> Iterator[HostileRequest]:
    yield from _with_fields(GENERATE, NATIVE)
    for name, values in SAMPLING.items():
        for value in values:
            body = GOOD[GENERATE] | {"sampling_params": {name: value}}
            yield _request(GENERATE, f"sampling_params.{name}", value, body)
    for ids in [*BAD_IDS, [vocab_size], [[1], [vocab_size + 7]]]:
        yield _request(GENERATE, "input_ids", ids, {"input_ids": ids})
    for fields in LOGPROBS:
        body = GOOD[GENERATE] | {"return_logprob": True} | fields
        yield _request(GENERATE, "logprobs", fields, body)
    for fields in BATCHES:
        yield _request(GENERATE, "batch", fields, fields)
    yield _request(GENERATE, "nothing", {}, {})


def _with_fields(path: str, fields: dict[str, list[Any]]) -> Iterator[HostileRequest]:
    for name, values in fields.items():
        for value in values:
            yield _request(path, name, value, ALL_GOOD[path] | {name: value})


def _request(path: str, field: str, value: Any, body: Any) -> HostileRequest:
    return HostileRequest(f"{path} {field}={value!r:.60}", path, json.dumps(body).encode())


def _broken_bodies(path: str) -> Iterator[HostileRequest]:
    good = orjson.dumps(ALL_GOOD[path])
    bodies = {
        "empty": b"",
        "cut": good[:-3],
        "trailing": good + b"}",
        "an array": b"[" + good + b"]",
        "a string": b'"hi"',
        "null": b"null",
        "NaN": good[:-1] + b', "temperature": NaN}',
        "Infinity": good[:-1] + b', "top_p": Infinity}',
        "minus infinity": good[:-1] + b', "top_p": -Infinity}',
        "infinite number": good[:-1] + b', "top_p": 1e999}',
        "lone surrogate": good[:-1] + b', "rid": "\\ud800"}',
        "no UTF-8": good[:-1] + b', "rid": "\xff\xfe"}',
        "zero byte": b"\x00" * 100,
        "deep": good[:-1] + b', "x": ' + NESTED + b"}",
        "less deep": good[:-1] + b', "x": ' + b"[" * 100 + b"]" * 100 + b"}",
        "single quotes": good.replace(b'"', b"'"),
    }
    for name, body in bodies.items():
        yield HostileRequest(f"{path} {name}", path, body)
    yield HostileRequest(f"{path} form", path, b"text=hi", "application/x-www-form-urlencoded")
    yield HostileRequest(f"{path} multipart", path, b"--x--\r\n", "multipart/form-data; boundary=x")
    yield HostileRequest(f"{path} UTF-16", path, good.decode().encode("utf-16"), "text/plain")


def _too_long(path: str, max_chars: int) -> Iterator[HostileRequest]:
    text = "ab " * (max_chars // 3)
    fields = {COMPLETIONS: "prompt", CHAT: "messages", EMBEDDINGS: "input"}
    field = fields.get(path, "text")
    value: Any = [{"role": "user", "content": text}] if path == CHAT else text
    yield HostileRequest(
        f"{path} {len(text)} characters",
        path,
        orjson.dumps(ALL_GOOD[path] | {field: value}),
    )
