"""One request of the load generator: what is sent, and how every kind of stream is read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from fake_llm import (
    NUM_PROMPT,
    FakeLlm,
    Script,
    chat_event,
    native_event,
    running,
    sse,
    text_event,
    usage_event,
    well_behaved,
)
from hypothesis import given
from hypothesis import strategies as st

from sgl.bench.backends import BACKENDS, BodyMaker, merged
from sgl.bench.events import EventSplitter
from sgl.bench.prompts import Content, Turn
from sgl.bench.servers import Answer, Client, error_text

SCHEMA = {"type": "object"}


def maker(backend: str = "sgl", **named: Any) -> BodyMaker:
    return BodyMaker(backend=BACKENDS[backend], model="m", **({"extra": {}} | named))


def ask(
    answer: Callable[[str, dict[str, Any]], Script] | Script,
    backend: str = "sgl",
    *,
    content: Content = "hi",
    num: int = 3,
    timeout_s: float = 5.0,
    **named: Any,
) -> Answer:
    fake = FakeLlm(answer if callable(answer) else lambda path, body: answer)
    with running(fake):
        return asyncio.run(_ask(fake.url, content, num, timeout_s, maker(backend, **named)))


async def _ask(url: str, content: Content, num: int, timeout_s: float, made: BodyMaker) -> Answer:
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        return await Client(session, url, made).ask(content, Turn("unused", num))


def body(backend: str, content: Content = "hi", schema: Any = None, **named: Any) -> dict[str, Any]:
    return json.loads(maker(backend, **named).body(content, 5, schema))


# what is sent


def test_the_native_body_takes_text_or_ids():
    sampling = {"max_new_tokens": 5, "temperature": 0.0, "ignore_eos": True}
    assert body("sgl") == {"text": "hi", "sampling_params": sampling, "stream": True}
    assert body("sgl", [1, 2])["input_ids"] == [1, 2]


def test_openai_bodies_ask_for_usage_and_only_openai_lacks_ignore_eos():
    vllm = body("vllm", [1, 2])
    assert (vllm["prompt"], vllm["max_tokens"], vllm["ignore_eos"]) == ([1, 2], 5, True)
    assert vllm["stream_options"] == {"include_usage": True}
    openai = body("openai-chat", is_stream=False)
    assert openai == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 5,
        "temperature": 0.0,
        "stream": False,
    }


def test_ends_are_allowed_where_asked_for_or_where_a_grammar_says_them():
    assert body("vllm", ignores_eos=False)["ignore_eos"] is False
    native = body("sgl", schema=SCHEMA, schema_mode="json_schema")["sampling_params"]
    assert (native["json_schema"], native["ignore_eos"]) == ('{"type":"object"}', False)
    chat = body("vllm-chat", schema=SCHEMA, schema_mode="response_format")
    assert chat["response_format"]["json_schema"]["schema"] == SCHEMA
    assert body("vllm", schema=SCHEMA) == body("vllm")


def test_extra_fields_are_merged_into_objects_and_win():
    extra = {"sampling_params": {"temperature": 1.0}, "rid": "x"}
    made = body("sgl", extra=extra)
    assert made["sampling_params"] == {"max_new_tokens": 5, "temperature": 1.0, "ignore_eos": True}
    assert made["rid"] == "x"
    assert merged({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}


# server-sent events


STREAM = (
    b": hello\r\nevent: x\ndata: one\n\ndata:two\r\n\r\ndata: a\ndata: b\n\n"
    b"id: 3\n\ndata: [DONE]\n\n"
)
EVENTS = [b"one", b"two", b"a\nb", b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM))))
def test_events_come_out_whole_wherever_the_stream_is_cut(cuts):
    edges = sorted({0, len(STREAM), *cuts})
    splitter = EventSplitter()
    pieces = [STREAM[start:end] for start, end in pairwise(edges)]
    events = [event for piece in pieces for event in splitter.feed(piece)]
    assert events + splitter.close() == EVENTS


def test_an_event_without_the_empty_line_behind_it_is_given_at_the_end():
    splitter = EventSplitter()
    assert splitter.feed(b"data: one\n\ndata: tw") == [b"one"]
    assert splitter.feed(b"o") == []
    assert splitter.close() == [b"two"]
    assert splitter.close() == []


# answers


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_streams_text_counts_and_times(backend):
    answer = ask(well_behaved, backend)
    assert (answer.error, answer.text) == ("", "aaa")
    assert (answer.num_input, answer.num_output) == (NUM_PROMPT, 3)
    assert answer.num_cached == (3 if backend == "sgl" else None)
    first, *_, last = answer.chunk_times
    assert len(answer.chunk_times) == 3
    assert answer.sent_s < first < last == answer.end_s


@pytest.mark.parametrize("backend", ["sgl", "openai", "openai-chat"])
def test_a_whole_answer_has_an_end_but_no_chunks(backend):
    answer = ask(well_behaved, backend, is_stream=False)
    assert (answer.error, answer.text, answer.num_output) == ("", "aaa", 3)
    assert answer.chunk_times == []
    assert answer.end_s > answer.sent_s


def test_chunks_without_new_tokens_are_not_chunks():
    events = [native_event(0, ""), native_event(2, "ab"), native_event(2, "ab", is_last=True)]
    answer = ask(Script([sse(*events)]))
    assert (len(answer.chunk_times), answer.num_output) == (1, 2)
    opened = [chat_event(""), chat_event("a"), chat_event("", "stop"), usage_event(2)]
    answer = ask(Script([sse(*opened)]), "openai-chat")
    assert (len(answer.chunk_times), answer.num_output, answer.text) == (1, 2, "a")


def test_a_native_stream_may_hold_only_what_is_new():
    events = [native_event(1, "ab"), native_event(2, "cd"), native_event(3, "ef", is_last=True)]
    assert ask(Script([sse(*events)])).text == "abcdef"


def test_reasoning_is_timed_and_cached_tokens_are_read():
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]}
    usage = usage_event(4)
    usage["usage"]["prompt_tokens_details"] = {"cached_tokens": 5}
    answer = ask(Script([sse(thought, chat_event("a", "stop"), usage)]), "openai-chat")
    assert (answer.text, len(answer.chunk_times), answer.num_cached) == ("a", 2, 5)


def test_a_server_that_tells_no_counts_leaves_them_open():
    answer = ask(Script([sse(text_event("a"), text_event("b", "stop"))]), "openai")
    assert (answer.num_input, answer.num_output, answer.error) == (None, None, "")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (Script([b'{"error": {"message": "too long"}}'], status=400), "status 400: too long"),
        (Script([b"upstream"], status=502, kind="text/html"), "status 502: upstream"),
        (Script([sse(native_event(1, "a"), {"error": {"message": "died"}})]), "died"),
        (Script([sse(native_event(1, "a"), end=b"")]), "the stream broke off before"),
        (Script([sse(native_event(1, "a"), end=b"")], hangs_up=True), "the connection broke off"),
        (Script([b"data: {nonsense\n\n"]), "not what this --backend sends: {nonsense"),
        (Script([b"data: [1]\n\n"]), "not what this --backend sends: [1]"),
        (Script([sse(text_event("a"))]), "not what this --backend sends: "),
        (
            Script([sse(native_event(1, "a", finish_reason={"type": "abort", "message": "gone"}))]),
            "aborted: gone",
        ),
        (Script([b'{"text": "a"}'], kind="application/json"), "not what this --backend sends"),
    ],
)
def test_each_failure_is_said_and_raises_nothing(script, said):
    answer = ask(script)
    assert said in answer.error
    assert answer.end_s > answer.sent_s


def test_a_stream_with_a_finish_but_no_done_is_complete():
    assert ask(Script([sse(native_event(1, "a", is_last=True), end=b"")])).error == ""


def test_a_silent_server_is_given_up():
    answer = ask(Script([], delay_s=0.5), timeout_s=0.05)
    assert answer.error == "no answer within --request-timeout"


def test_nobody_there_is_an_error_too():
    answer = asyncio.run(_ask("http://127.0.0.1:1", "hi", 1, 5.0, maker()))
    assert answer.error.startswith("the connection failed: ")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"error": {"message": "m", "code": 1}}', "m"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"object": "error", "message": "m"}', "m"),
        (b'{"detail": "not found"}', "not found"),
        (b"plain", "plain"),
        (b"", "no reason given"),
    ],
)
def test_messages_are_found_in_errors_of_any_shape(data, text):
    assert error_text(data) == text
