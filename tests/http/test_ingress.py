"""The ingress over real sockets, in front of a fake engine."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import openai
import orjson
import pytest
from fakes import VOCAB_SIZE, in_loop, until
from hostile import hostile_requests
from ingress_server import CONTEXT_LEN, is_ready, server

from sgl.actors import connections
from sgl.actors.http_answer import answer_call
from sgl.actors.ingress import listen
from sgl.actors.status_page import SchedulerStatus
from sgl.errors import ConfigError
from sgl.messages import Drain, EngineDied, StartProfile


@in_loop
async def test_it_generates() -> None:
    async with server() as s:
        answer = await s.generate("a", max_new_tokens=3, temperature=0)
        assert answer["text"] == "bcd"
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
        status, batch = await s.post(
            "/generate", {"text": ["a", "x"], "sampling_params": {"n": 2, "max_new_tokens": 1}}
        )
        assert status == 200
        assert [item["text"] for item in batch] == ["b", "b", "y", "y"]


@in_loop
async def test_no_new_tokens_is_prefill_only() -> None:
    async with server() as s:
        answer = await s.generate("abc", max_new_tokens=0)
        assert (answer["text"], answer["output_ids"]) == ("", [])
        assert answer["meta_info"]["completion_tokens"] == 0
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


@in_loop
async def test_a_stream_is_cumulative_and_ends_as_the_whole_answer_does() -> None:
    async with server() as s:
        body = {"text": "a", "sampling_params": {"max_new_tokens": 10}}
        events = await s.events("/generate", body)
        texts = [event["text"] for event in events]
        assert texts[-1] == "bcdefghijk" == (await s.generate("a", max_new_tokens=10))["text"]
        assert texts == sorted(texts, key=len)
        assert [e["meta_info"]["finish_reason"] for e in events][:-1] == [None] * (len(events) - 1)


@in_loop
async def test_stream_output_sends_only_what_is_new() -> None:
    async with server(stream_output=True) as s:
        body = {"text": "a", "sampling_params": {"max_new_tokens": 10}}
        events = await s.events("/generate", body)
        assert "".join(event["text"] for event in events) == "bcdefghijk"


@in_loop
async def test_streams_of_a_batch_are_told_apart_by_index() -> None:
    async with server() as s:
        body = {"text": ["a", "x"], "sampling_params": {"max_new_tokens": 2}}
        last = {event["index"]: event["text"] for event in await s.events("/generate", body)}
        assert last == {0: "bc", 1: "yz"}


@in_loop
async def test_logprobs_of_prompt_and_answer() -> None:
    async with server() as s:
        body = {
            "text": "ab",
            "sampling_params": {"max_new_tokens": 2},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 1,
        }
        _, answer = await s.post("/generate", body)
        meta = answer["meta_info"]
        assert meta["input_token_logprobs"] == [[None, 97, None], [-6.125, 98, None]]
        assert meta["output_token_logprobs"] == [[-6.1875, 99, None], [-6.25, 100, None]]
        assert meta["output_top_logprobs"][0] == [[-6.1875, 99, None]]


@in_loop
async def test_an_error_inside_the_engine_is_an_answer_or_an_event() -> None:
    async with server() as s:
        s.engine.fail_next("the logits were NaN", 500)
        assert await s.post("/generate", {"text": "a"}) == (
            500,
            {"error": {"message": "the logits were NaN"}},
        )
        s.engine.fail_next("the logits were NaN", 500)
        events = await s.events("/generate", {"text": "a"})
        assert events[-1] == {"error": {"message": "the logits were NaN"}}
        s.engine.fail_next("no such thing", 400)
        status, _ = await s.post("/generate", {"text": "a"})
        assert status == 400


@in_loop
async def test_every_error_is_json_in_the_shape_of_its_path() -> None:
    async with server(max_body_mb=0.01) as s:
        for path, status in (("/nowhere", 404), ("/v1/nowhere", 404)):
            code, body = await s.post(path, {})
            assert (code, "message" in body["error"]) == (status, True)
        assert body["error"]["type"] == "NotFoundError"
        async with s.http.get(s.url + "/v1/completions") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
        code, body = await s.post("/generate", {"text": "x" * 20_000})
        assert (code, "--max-body-mb" in body["error"]["message"]) == (413, True)
        status, body = await s.post("/v1/completions", {"prompt": "x" * 5000})
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b"x" * 1000

        async with s.http.post(s.url + "/generate", data=chunks()) as response:
            assert response.status == 413
            assert "error" in await response.json()
        packed = {"Content-Encoding": "gzip"}
        async with s.http.post(s.url + "/generate", data=b"{}", headers=packed) as response:
            assert response.status == 400
            assert "cannot be decoded" in (await response.json())["error"]["message"]


@in_loop
async def test_a_bug_is_a_500_without_traceback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server() as s:

        async def broken(call: Any) -> None:
            raise KeyError("secret")

        monkeypatch.setattr(s.front, "submit", broken)
        async with s.http.post(
            s.url + "/generate", json={"text": "a"}, headers={"X-Request-Id": "my-id"}
        ) as response:
            assert response.status == 500
            text = await response.text()
        assert "my-id" in text
        assert "secret" not in text
        assert [record.message for record in caplog.records if record.exc_info] == [
            "request my-id failed"
        ]


@in_loop
async def test_responses_carry_the_request_id_and_cors() -> None:
    async with server() as s:
        for given, echoed in (("abc-1", "abc-1"), ("a" * 200, None), ("", None)):
            async with s.http.get(s.url + "/health", headers={"X-Request-Id": given}) as response:
                assert response.headers["Access-Control-Allow-Origin"] == "*"
                if echoed:
                    assert response.headers["X-Request-Id"] == echoed
                else:
                    assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-Id"])
        async with s.http.options(s.url + "/v1/chat/completions") as response:
            assert response.status == 204
            assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
            assert "Access-Control-Allow-Credentials" not in response.headers


@in_loop
async def test_a_wrong_key_is_refused_before_the_body_is_read() -> None:
    async with server(api_key="right") as s:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(s.url.rpartition(":")[2]))
        writer.write(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer rig\r\n"
            b"Content-Length: 1000000000\r\n\r\n"
        )
        async with asyncio.timeout(2):
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(24)
        assert head.startswith(b"HTTP/1.1 401")
        assert body == b'{"error":"Unauthorized"}'
        writer.close()
        status, body = await s.post("/v1/completions", {"prompt": "a"})
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
    ],
)
@in_loop
async def test_web_pages_cannot_use_admin_routes(headers: dict[str, str], status: int) -> None:
    async with server() as s:
        code, _ = await s.post("/flush_cache", {}, headers=headers)
        assert code == status
        code, _ = await s.post("/abort_request", {"abort_all": True}, headers=headers)
        assert code == status


@in_loop
async def test_keys_are_never_told() -> None:
    async with server(api_key="api-key", admin_api_key="admin-key") as s:
        for key, has_details in (("api-key", False), ("admin-key", True)):
            headers = {"Authorization": f"Bearer {key}"}
            for path in ("/get_server_info", "/get_server_args"):
                async with s.http.get(s.url + path, headers=headers) as response:
                    text = await response.text()
                assert ("stream_interval" in text) is has_details
                assert "max_req_input_len" in text
                assert "-key" not in text


@in_loop
async def test_before_the_warm_up_it_lives_but_is_not_ready(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with server(is_open=False) as s:
        assert await s.get("/health/live") == 200
        assert await s.get("/health") == await s.get("/health/ready") == 503
        assert await s.get("/health_generate") == 503
        async with s.http.post(s.url + "/generate", json={"text": "a"}) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
        s.engine.open()
        await is_ready(s)
        assert s.engine.seen[0].sampling.max_new_tokens == 8
        assert await s.get("/health_generate") == 200
        ready_lines = [r.message for r in caplog.records if "ready to roll" in r.message]
        assert len(ready_lines) == 1
        assert s.url in ready_lines[0]
        [path, line] = re.findall(r"curl http://[^/]+(/\S+).*-d '(.*)'", ready_lines[0], re.DOTALL)[
            0
        ]
        status, answer = await s.post(path, orjson.loads(line))
        assert status == 200
        assert answer["choices"][0]["message"]["content"]


@in_loop
async def test_leaving_clients_end_their_requests(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with server(step_s=0.002) as s:
        body = {"text": ["a"] * 2, "sampling_params": {"n": 2, "max_new_tokens": 4000}}
        for is_stream in (False, True):
            request = asyncio.create_task(s.post("/generate", body | {"stream": is_stream}))
            await until(lambda: s.engine.num_running == 4)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            await until(lambda: s.engine.num_running == 0)
        assert s.front.num_live == 0
        assert len(s.engine.aborted) == 8
    aborts = [record for record in caplog.records if "Abort" in record.message]
    assert len(aborts) == 2
    assert not [record for record in caplog.records if record.exc_info]
    assert all(record.levelno == logging.INFO for record in caplog.records)


@in_loop
async def test_a_client_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_call, "__defaults__", (0.1,))
    async with server() as s:
        port = int(s.url.rpartition(":")[2])
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        body = orjson.dumps(
            {"text": ["a"] * 100, "stream": True, "sampling_params": {"max_new_tokens": 4000}}
        )
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(sock, head.encode() + body)
        await until(lambda: len(s.engine.seen) == 101)  # with the warm-up
        await until(lambda: s.front.num_live == 0)
        await until(lambda: len(s.engine.aborted) == 100)
        sock.close()


@in_loop
async def test_abort_request_by_rid_and_all() -> None:
    async with server(step_s=0.002) as s:
        body = {"text": "a", "rid": "mine", "sampling_params": {"max_new_tokens": 4000}}
        for abort in ({"rid": "mine"}, {"abort_all": True}):
            request = asyncio.create_task(s.post("/generate", body))
            await until(lambda: s.engine.num_running == 1)
            status, answer = await s.post("/generate", body)
            assert (status, "in use" in answer["error"]["message"]) == (400, True)
            assert (await s.post("/abort_request", abort))[1]["success"]
            status, answer = await request
            assert status == 200
            assert answer["meta_info"]["finish_reason"]["type"] == "abort"
            assert s.engine.num_running == 0
        assert (await s.post("/abort_request", {"rid": "mine"}))[1] == {"success": False}
        assert s.engine.controls == ["abort_all"]


@in_loop
async def test_the_cache_is_flushed_only_when_nothing_runs() -> None:
    async with server(step_s=0.002) as s:
        async with s.http.get(s.url + "/flush_cache") as response:
            assert (await response.text()).startswith("Cache flushed.\n")
        request = asyncio.create_task(s.generate("a", max_new_tokens=4000))
        await until(lambda: s.engine.num_running == 1)
        status, body = await s.post("/flush_cache", {})
        assert (status, "running" in body["error"]["message"]) == (400, True)
        request.cancel()


@in_loop
async def test_profiles_are_started_and_stopped() -> None:
    async with server() as s:
        asked = {"output_dir": "traces", "num_steps": 5, "activities": ["CPU", "GPU"]}
        assert await s.post("/start_profile", asked) == (200, "Profiled.\n")
        started = s.engine.profile
        assert isinstance(started, StartProfile)
        assert (started.folder, started.num_steps) == ("traces", 5)
        assert started.activities == ("CPU", "GPU")
        refusal = (400, {"error": {"message": "no, thanks"}})
        assert await s.post("/start_profile", {}) == refusal
        assert await s.get("/stop_profile") == 200
        assert await s.post("/stop_profile", {}) == refusal
        assert await s.get("/start_profile") == 200  # without a body
        assert isinstance(s.engine.profile, StartProfile)
        assert (s.engine.profile.folder, s.engine.profile.activities) == (None, ())


@pytest.mark.parametrize(
    ("body", "named"),
    [({"num_steps": 0}, "num_steps"), ({"activities": ["RPD"]}, "RPD"), ({"steps": 1}, "steps")],
)
@in_loop
async def test_a_profile_that_nobody_understands_is_refused(
    body: dict[str, Any], named: str
) -> None:
    async with server() as s:
        status, answer = await s.post("/start_profile", body)
        assert (status, named in answer["error"]["message"]) == (400, True)
        assert s.engine.profile is None


@in_loop
async def test_draining_finishes_what_runs() -> None:
    async with server(step_s=0.001) as s:
        running = [asyncio.create_task(s.generate("a", max_new_tokens=150)) for _ in range(8)]
        await until(lambda: s.engine.num_running == 8)
        s.ingress.receive([Drain(0.05, 10.0)])
        await asyncio.sleep(0.01)
        assert await s.get("/health/ready") == 503
        assert (await s.generate("a", max_new_tokens=1))["text"] == "b"
        await asyncio.sleep(0.06)
        status, body = await s.post("/generate", {"text": "a"})
        assert (status, "shutting down" in body["error"]["message"]) == (503, True)
        answers = await asyncio.gather(*running)
        assert [len(answer["output_ids"]) for answer in answers] == [150] * 8
        await s.task


@in_loop
async def test_what_does_not_finish_in_time_gets_an_error() -> None:
    async with server(step_s=0.002) as s:
        body = {"text": "a", "sampling_params": {"max_new_tokens": 4000}}
        stream = asyncio.create_task(s.events("/generate", body))
        whole = asyncio.create_task(s.post("/generate", body))
        await until(lambda: s.engine.num_running == 2)
        s.ingress.receive([Drain(0.0, 0.05)])
        events = await stream
        assert "server_shutdown" in events[-1]["error"]["message"]
        status, answer = await whole
        assert (status, "server_shutdown" in answer["error"]["message"]) == (500, True)
        await s.task
        await until(lambda: s.engine.num_running == 0)


@in_loop
async def test_when_the_engine_dies_clients_hear_it_and_the_server_ends() -> None:
    async with server(step_s=0.002) as s:
        body = {"text": "a", "sampling_params": {"max_new_tokens": 4000}}
        stream = asyncio.create_task(s.events("/generate", body))
        whole = asyncio.create_task(s.post("/v1/completions", {"prompt": "a", "max_tokens": 4000}))
        await until(lambda: s.engine.num_running == 2)
        s.ingress.receive([EngineDied("the worker was killed")])
        assert "the worker was killed" in (await stream)[-1]["error"]["message"]
        status, answer = await whole
        assert (status, answer["error"]["type"]) == (500, "InternalServerError")
        await s.task


@in_loop
async def test_metrics_are_in_the_text_format() -> None:
    async with server() as s:
        await s.events("/generate", {"text": "abc", "sampling_params": {"max_new_tokens": 5}})
        async with s.http.get(s.url + "/metrics") as response:
            text = await response.text()
    label = '{model_name="letters"}'
    assert f"sglang:num_running_reqs{label} 3.0" in text
    assert f"sglang:token_usage{label} 0.5" in text
    assert f"sglang:num_requests_total{label} 2.0" in text  # with the warm-up
    assert f"sglang:generation_tokens_total{label} 13.0" in text
    assert f"sglang:time_to_first_token_seconds_count{label} 1.0" in text
    assert f"sglang:inter_token_latency_seconds_count{label} 4.0" in text
    assert text.count("\nsglang:") < 150


@in_loop
async def test_a_text_goes_on_from_the_tokens_of_an_earlier_answer() -> None:
    async with server() as s:
        sampling = {"max_new_tokens": 3}
        body = {"text": "a", "sampling_params": sampling, "return_token_ids": True}
        meta = (await s.post("/generate", body))[1]["meta_info"]
        assert (meta["prompt_token_ids"], meta["text_token_ids"]) == ([97], [98, 99, 100])
        ids = meta["prompt_token_ids"] + meta["text_token_ids"]
        more = {"text": "xy", "prefix_ids": ids, "sampling_params": sampling}
        _, answer = await s.post("/generate", more)
        assert (answer["text"], answer["meta_info"]["prompt_tokens"]) == ("z{|", 6)
        many = {"text": ["p", "s"], "prefix_ids": [[1], []], "sampling_params": sampling}
        answers = (await s.post("/generate", many))[1]
        assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [2, 1]
        for wrong in ({"input_ids": [1]}, {"text": "a", "session_params": {"id": "s"}}):
            assert (await s.post("/generate", {"prefix_ids": [1]} | wrong))[0] == 400


@in_loop
async def test_tokenize_and_back() -> None:
    async with server() as s:
        _, answer = await s.post("/tokenize", {"text": "hi"})
        assert (answer["tokens"], answer["count"]) == ([104, 105], 2)
        _, answer = await s.post("/tokenize", {"text": ["hi", ""]})
        assert (answer["tokens"], answer["count"]) == ([[104, 105], []], [2, 0])
        assert (await s.post("/detokenize", {"tokens": [104, 105]}))[1] == {"text": "hi"}
        assert (await s.post("/detokenize", {"tokens": [-1]}))[0] == 400


@in_loop
async def test_connections_without_a_request_are_closed() -> None:
    deadline = connections.HeaderDeadline(timeout_s=10.0)

    class Connection(asyncio.Protocol):
        def __init__(self) -> None:
            self.num_aborts = 0

        @property
        def transport(self) -> Any:
            return self

        def abort(self) -> None:
            self.num_aborts += 1

    silent, served = Connection(), Connection()
    deadline.mark_served(served)
    for now in (0.0, 5.0, 10.5):
        deadline.sweep([silent, served], now)
    assert (silent.num_aborts, served.num_aborts) == (1, 0)


def test_a_scheduler_with_work_but_no_steps_is_stalled() -> None:
    watch = connections.StallWatch(timeout_s=5.0)
    busy = SchedulerStatus(num_running_reqs=1, num_steps=7)
    for now, status, is_stalled in (
        (0.0, SchedulerStatus(num_steps=7), False),
        (100.0, busy, False),
        (104.0, busy, False),
        (106.0, busy, True),
        (107.0, SchedulerStatus(num_running_reqs=1, num_steps=8), False),
        (108.0, SchedulerStatus(num_queue_reqs=1, num_steps=8, is_loading=1), False),
        (208.0, SchedulerStatus(num_queue_reqs=1, num_steps=8, is_loading=1), False),
    ):
        watch.look(status, now)
        assert watch.is_stalled is is_stalled, now


def test_a_port_in_use_is_an_error_of_the_operator() -> None:
    taken = listen("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()


@in_loop
async def test_hostile_requests_get_an_error_and_disturb_nobody() -> None:
    async with server(step_s=0.01) as s:
        body = {"text": "a", "sampling_params": {"max_new_tokens": 150}}
        expected = await s.generate("a", max_new_tokens=150)
        streams = [asyncio.create_task(s.events("/generate", body)) for _ in range(20)]
        num_requests = 0
        for hostile in hostile_requests(VOCAB_SIZE):
            async with s.http.post(
                s.url + hostile.path,
                data=io.BytesIO(hostile.body),
                headers={"Content-Type": hostile.content_type},
            ) as response:
                assert 400 <= response.status < 500, (hostile.name, await response.text())
                told = await response.json()
                error = told.get("error", told)  # of an update, only the message
                assert error["message"], hostile.name
                assert len(error["message"]) < 1000, hostile.name
                assert hostile.path.startswith("/v1/") is ("type" in error), hostile.name
            num_requests += 1
        assert num_requests >= 300
        for events in await asyncio.gather(*streams):
            assert events[-1]["text"] == expected["text"]
        assert s.front.num_live == 0


# The same server through the client most people use.


@in_loop
async def test_the_openai_client_completes() -> None:
    async with server(enable_cache_report=True) as s, s.openai() as client:
        done = await client.completions.create(
            model="default", prompt=["a", "x"], max_tokens=3, n=2, logprobs=1, echo=True, seed=1
        )
        assert [choice.text for choice in done.choices] == ["abcd", "abcd", "xyz{", "xyz{"]
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        logprobs = done.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == ["a", "b", "c", "d"]
        assert logprobs.token_logprobs == [None, -6.125, -6.1875, -6.25]
        assert logprobs.text_offset == [0, 1, 2, 3]
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, 12)
        assert done.usage.prompt_tokens_details is not None


@in_loop
async def test_the_openai_client_streams_completions() -> None:
    async with server() as s, s.openai() as client:
        stream = await client.completions.create(
            model="m",
            prompt="a",
            max_tokens=5,
            stream=True,
            stop=["e"],
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "bcde"[:-1]
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert {(chunk.id, chunk.model) for chunk in chunks} == {(chunks[0].id, "m")}


@in_loop
async def test_the_openai_client_chats() -> None:
    async with server() as s, s.openai() as client:
        done = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            max_completion_tokens=3,
            logprobs=True,
            top_logprobs=2,
            n=2,
        )
        assert [choice.message.content for choice in done.choices] == ["bcd", "bcd"]
        assert done.choices[0].finish_reason == "length"
        logprobs = done.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [token.token for token in logprobs.content] == ["b", "c", "d"]
        assert logprobs.content[0].bytes == [98]
        assert len(logprobs.content[0].top_logprobs) == 2
        assert s.engine.seen[-1].sampling.temperature == 0.7


@in_loop
async def test_the_openai_client_streams_chats() -> None:
    async with server() as s, s.openai() as client:
        stream = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "a"}],
            max_tokens=4,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts = {0: "", 1: ""}
        chunks = [chunk async for chunk in stream]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == {0: "bcde", 1: "bcde"}
        assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant"] * 2
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 8
        assert all(chunk.usage is None for chunk in chunks[:-1])


@in_loop
async def test_the_openai_client_raises_its_own_errors() -> None:
    async with server(api_key="right") as s:
        async with openai.AsyncOpenAI(base_url=s.url + "/v1", api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai.AsyncOpenAI(
            base_url=s.url + "/v1", api_key="right", max_retries=0
        ) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(model="m", prompt="x" * 5000)
            assert caught.value.code == "context_length_exceeded"
            with pytest.raises(openai.NotFoundError, match="there is no model 'nothing'") as lost:
                await client.models.retrieve("nothing")
            assert (lost.value.code, lost.value.param) == ("model_not_found", "model")
            s.engine.fail_next("the logits were NaN", 500)
            with pytest.raises(openai.InternalServerError):
                await client.completions.create(model="m", prompt="a")
            s.engine.fail_next("the logits were NaN", 500)
            stream = await client.completions.create(model="m", prompt="a", stream=True)
            with pytest.raises(openai.APIError, match="NaN"):
                async for _ in stream:
                    pass


@in_loop
async def test_a_wrong_base_url_is_told_from_a_wrong_path() -> None:
    async with server() as s:
        for path in ("/completions", "/v1/v1/completions", "/v1/completions/", "//completions"):
            status, body = await s.post(path, {"prompt": "a"})
            assert (status, "/v1/completions:" in body["error"]["message"]) == (404, True), path
        for path in ("/v1/nowhere", "/nowhere", "/"):
            status, body = await s.post(path, {})
            assert (status, "base URL" in body["error"]["message"]) == (404, False), path


@in_loop
async def test_the_openai_client_finds_the_model() -> None:
    async with server(served_model_name="org/letters") as s, s.openai() as client:
        [card] = (await client.models.list()).data
        assert (card.id, card.object, card.owned_by) == ("org/letters", "model", "sgl")
        assert card.model_extra is not None
        assert card.model_extra["max_model_len"] == CONTEXT_LEN
        assert (await client.models.retrieve("org/letters")).id == "org/letters"
        assert (await client.models.retrieve("default")).id == "org/letters"
