"""Sessions over HTTP, in front of a fake engine: after "a" comes "bcd…"."""

from __future__ import annotations

import asyncio
from typing import Any

from fakes import in_loop, until
from ingress_server import Server, server


async def opened(s: Server, capacity: int = 1000, **fields: Any) -> str:
    status, session_id = await s.post("/open_session", {"capacity_of_str_len": capacity, **fields})
    assert status == 200
    return session_id.strip('"')


def in_session(text: Any, session: dict[str, Any], num: int = 3, **fields: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": num}
    return {"text": text, "session_params": session, "sampling_params": sampling, **fields}


def prompts(s: Server) -> list[str]:
    return [bytes(message.prompt_ids[::4]).decode() for message in s.engine.seen]


@in_loop
async def test_a_conversation_goes_on_from_prompt_and_answer() -> None:
    async with server() as s:
        session_id = await opened(s)
        session: dict[str, Any] = {"id": session_id}
        for text, rid in (("a", "one"), ("k", "two"), ("x", "three")):
            status, answer = await s.post("/generate", in_session(text, session, rid=rid))
            assert status == 200
            session = {"id": session_id, "rid": answer["meta_info"]["id"]}
        assert prompts(s)[-3:] == ["a", "abcdk", "abcdklmnx"]
        assert answer["text"] == "yz{"
        assert answer["meta_info"]["prompt_tokens"] == 9
        status, _ = await s.post("/close_session", {"session_id": session_id})
        assert status == 200
        status, answer = await s.post("/generate", in_session("a", session))
        assert (status, answer["text"]) == (200, "")
        finish = answer["meta_info"]["finish_reason"]
        assert (finish["type"], finish["status_code"]) == ("abort", 404)
        assert "there is no session" in finish["message"]
        assert s.front.num_live == 0


@in_loop
async def test_streams_and_log_probabilities_work_in_a_session() -> None:
    async with server() as s:
        session_id = await opened(s, session_id="mine")
        assert session_id == "mine"
        await s.post("/generate", in_session("a", {"id": "mine"}, rid="one"))
        session = {"id": "mine", "rid": "one", "offset": -1}
        body = in_session("k", session, return_logprob=True, logprob_start_len=2)
        events = await s.events("/generate", body)
        assert events[-1]["text"] == "lmn"
        assert prompts(s)[-1] == "abck"
        meta = events[-1]["meta_info"]
        assert [row[1] for row in meta["input_token_logprobs"]] == [ord("c"), ord("k")]
        assert [row[1] for row in meta["output_token_logprobs"]] == [ord(x) for x in "lmn"]
        assert len(events) > 1


@in_loop
async def test_replace_ends_the_stream_it_replaces() -> None:
    async with server(step_s=0.005) as s:
        session_id = await opened(s)
        body = in_session("a", {"id": session_id}, num=1000, rid="long")
        stream = asyncio.create_task(s.events("/generate", body))
        await until(lambda: s.engine.num_running == 1)
        await asyncio.sleep(0.03)
        session = {"id": session_id, "rid": "long", "replace": False}
        _, answer = await s.post("/generate", in_session("x", session))
        finish = answer["meta_info"]["finish_reason"]
        assert (finish["type"], finish["status_code"]) == ("abort", 409)
        session["replace"] = True
        _, answer = await s.post("/generate", in_session("x", session))
        assert answer["text"] == "yz{"
        told = (await stream)[-1]
        assert told["meta_info"]["finish_reason"]["type"] == "abort"
        assert prompts(s)[-1].startswith("ab")
        assert prompts(s)[-1] == "a" + told["text"] + "x"
        assert s.front.num_live == 0


@in_loop
async def test_a_batch_may_hold_requests_of_sessions_and_others() -> None:
    async with server() as s:
        session_id = await opened(s)
        sessions = [{"id": session_id}, None, {"id": "none"}]
        body = in_session(["a", "b", "c"], sessions, rid=["r", "s", "t"])
        status, answers = await s.post("/generate", body)
        assert status == 200
        assert [answer["text"] for answer in answers] == ["bcd", "cde", ""]
        assert answers[2]["meta_info"]["finish_reason"]["type"] == "abort"
        await s.post("/generate", in_session("x", {"id": session_id, "rid": "r"}))
        assert prompts(s)[-1] == "abcdx"


@in_loop
async def test_what_cannot_be_is_refused_with_a_reason() -> None:
    async with server(max_sessions=2) as s:
        session_id = await opened(s, capacity=5)
        status, error = await s.post(
            "/open_session", {"capacity_of_str_len": 1, "session_id": session_id}
        )
        assert (status, "is open already" in error["error"]["message"]) == (400, True)
        await opened(s)
        status, error = await s.post("/open_session", {"capacity_of_str_len": 1})
        assert (status, "--max-sessions" in error["error"]["message"]) == (503, True)
        body = in_session("abc", {"id": session_id}) | {"sampling_params": {"n": 2}}
        status, error = await s.post("/generate", body)
        assert (status, "one answer" in error["error"]["message"]) == (400, True)
        status, error = await s.post("/generate", in_session("abcdef", {"id": session_id}))
        assert (status, "capacity_of_str_len is 5" in error["error"]["message"]) == (400, True)
        status, answer = await s.post("/generate", in_session("abc", {"id": session_id}, 2))
        assert (status, answer["text"]) == (200, "de")


@in_loop
async def test_a_client_that_left_leaves_its_request_behind_as_far_as_it_came() -> None:
    async with server(step_s=0.005) as s:
        session_id = await opened(s)
        body = in_session("a", {"id": session_id}, num=1000, rid="long", stream=True)
        async with s.http.post(s.url + "/generate", json=body) as response:
            await response.content.readline()
        await until(lambda: s.front.num_live == 0)
        session = {"id": session_id, "rid": "long", "offset": 2}
        status, answer = await s.post("/generate", in_session("x", session))
        assert (status, answer["text"], prompts(s)[-1]) == (200, "yz{", "abx")


@in_loop
async def test_idle_sessions_are_closed_though_nobody_asks() -> None:
    async with server(session_timeout=0.01) as s:
        await opened(s)
        assert len(s.front.sessions) == 1
        await until(lambda: len(s.front.sessions) == 0)


@in_loop
async def test_a_session_is_opened_by_get_as_well() -> None:
    async with server() as s:
        body = {"capacity_of_str_len": 10}
        async with s.http.get(s.url + "/open_session", json=body) as response:
            session_id = await response.json()
        assert response.status == 200
        async with s.http.get(s.url + "/close_session", json={"session_id": session_id}) as closed:
            assert (closed.status, await closed.read()) == (200, b"")
