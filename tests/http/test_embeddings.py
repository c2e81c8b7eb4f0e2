"""The routes that answer with vectors, over real sockets, in front of a fake engine."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import openai
import orjson
import pytest
from fakes import VOCAB_SIZE, in_loop, until, vector_of
from hostile import hostile_requests, hostile_vector_requests
from ingress_server import CONTEXT_LEN, Server, server


@asynccontextmanager
async def vector_server(**options: Any) -> AsyncIterator[Server]:
    async with server(**({"vector_sizes": (4,)} | options)) as made:
        yield made


def vector(text: str) -> list[float]:
    return np.frombuffer(vector_of([ord(letter) for letter in text]), np.float32).tolist()


@in_loop
async def test_encode_and_classify_answer_alike() -> None:
    async with vector_server() as s:
        for path in ("/encode", "/classify"):
            status, answer = await s.post(path, {"text": "abc", "rid": "mine"})
            assert status == 200
            assert answer["embedding"] == pytest.approx(vector("abc"), abs=1e-7)
            assert answer["meta_info"] == {
                "id": "mine",
                "finish_reason": {"type": "length", "length": 0},
                "prompt_tokens": 3,
                "cached_tokens": 2,
            }
        status, answers = await s.post("/encode", {"input_ids": [[1, 2], [3]]})
        assert [answer["embedding"][:3] for answer in answers] == [[2, 1, 2], [1, 3, 3]]
        async with s.http.put(s.url + "/encode", json={"text": "x"}) as response:
            assert response.status == 200


@in_loop
async def test_the_openai_client_gets_vectors_in_both_formats() -> None:
    async with vector_server() as s, s.openai() as client:
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = await client.embeddings.create(
                model="mine", input=["abc", "x", "longer"], **options
            )
            assert [row.index for row in answer.data] == [0, 1, 2]
            assert answer.model == "mine"
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (10, 10)
            vectors = [row.embedding for row in answer.data]
            if options.get("encoding_format") == "base64":
                vectors = [_decoded(one) for one in vectors]
            for found, text in zip(vectors, ("abc", "x", "longer"), strict=True):
                assert found == pytest.approx(vector(text), abs=1e-7)
        answer = await client.embeddings.create(model="mine", input=[97, 98])
        assert answer.data[0].embedding == pytest.approx(vector("ab"), abs=1e-7)


def _decoded(value: Any) -> list[float]:
    """What the client leaves to its caller, who asked for base64."""
    import base64

    return np.frombuffer(base64.b64decode(value), "<f4").tolist()


@in_loop
async def test_vectors_are_shortened_where_the_model_allows_it() -> None:
    async with vector_server(vector_sizes=(2, 4)) as s, s.openai() as client:
        answer = await client.embeddings.create(model="m", input="abc", dimensions=2)
        whole = np.array(vector("abc")[:2])
        assert answer.data[0].embedding == pytest.approx(whole / np.linalg.norm(whole), abs=1e-6)
        with pytest.raises(openai.BadRequestError, match="dimensions can be 2, 4"):
            await client.embeddings.create(model="m", input="abc", dimensions=3)


@in_loop
async def test_the_server_says_what_it_is_and_probes_work() -> None:
    async with vector_server() as s:
        async with s.http.get(s.url + "/get_model_info") as response:
            assert (await response.json())["is_generation"] is False
        assert await s.get("/health_generate") == 200
        assert [message.prompt_ids for message in s.engine.embedded][-1] == bytes(4)
        assert s.engine.seen == []


@in_loop
async def test_who_asks_for_text_is_told_what_to_ask_for() -> None:
    async with vector_server() as s:
        for path, body in (
            ("/generate", {"text": "a"}),
            ("/generate", {"text": "a", "stream": True}),
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            status, answer = await s.post(path, body)
            assert status == 400
            assert "gives vectors of texts" in answer["error"]["message"]


@in_loop
async def test_sessions_are_of_text_alone() -> None:
    async with vector_server() as s:
        status, answer = await s.post("/open_session", {"capacity_of_str_len": 10})
        assert status == 400
        assert "gives vectors of texts" in answer["error"]["message"]
        assert len(s.front.sessions) == 0
        body = {"text": "a", "session_params": {"id": "x"}}
        status, answer = await s.post("/encode", body)
        assert (status, "session_params" in answer["error"]["message"]) == (400, True)


@in_loop
async def test_who_asks_a_model_that_generates_for_vectors_is_told_the_flag() -> None:
    async with server() as s:
        for path, body in (
            ("/encode", {"text": "a"}),
            ("/classify", {"text": "a"}),
            ("/v1/embeddings", {"input": "a", "dimensions": 7}),
        ):
            status, answer = await s.post(path, body)
            assert status == 400
            assert "--is-embedding" in answer["error"]["message"]
        async with s.http.get(s.url + "/get_model_info") as response:
            assert (await response.json())["is_generation"] is True


@in_loop
async def test_a_prompt_may_fill_the_context() -> None:
    async with vector_server() as s:
        status, answer = await s.post("/encode", {"text": "a" * CONTEXT_LEN})
        assert status == 200
        assert answer["meta_info"]["prompt_tokens"] == CONTEXT_LEN
        embedded = len(s.engine.embedded)
        status, answer = await s.post("/v1/embeddings", {"input": ["a", "a" * (CONTEXT_LEN + 1)]})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert len(s.engine.embedded) == embedded, "the good one was sent all the same"


@in_loop
async def test_a_client_that_leaves_is_forgotten() -> None:
    async with vector_server(step_s=0.2) as s:
        asking = asyncio.create_task(s.post("/v1/embeddings", {"input": ["a", "b"]}))
        await until(lambda: s.engine.num_running == 2)
        asking.cancel()
        await until(lambda: s.engine.num_running == 0)
        assert len(s.engine.aborted) == 2
        assert s.front.num_live == 0


@in_loop
async def test_an_abort_by_rid_is_told() -> None:
    async with vector_server(step_s=0.2) as s:
        encoding = asyncio.create_task(s.post("/encode", {"text": ["a", "b"], "rid": ["x", "y"]}))
        embedding = asyncio.create_task(s.post("/v1/embeddings", {"input": "a", "rid": "z"}))
        await until(lambda: s.engine.num_running == 3)
        for rid in ("y", "z"):
            assert await s.post("/abort_request", {"rid": rid}) == (200, {"success": True})
        status, answers = await encoding
        assert status == 200
        assert [answer["embedding"] is None for answer in answers] == [False, True]
        status, answer = await embedding
        assert (status, answer["error"]["type"]) == (499, "AbortError")


@in_loop
async def test_an_error_inside_the_engine_is_the_answer() -> None:
    async with vector_server() as s:
        s.engine.fail_next("the model's output is not a number", 500)
        status, answer = await s.post("/v1/embeddings", {"input": "a"})
        assert (status, answer["error"]["message"]) == (500, "the model's output is not a number")


@in_loop
async def test_hostile_requests_get_an_error_and_disturb_nobody() -> None:
    async with vector_server() as s:
        embedded = len(s.engine.embedded)
        requests = [
            *hostile_vector_requests(VOCAB_SIZE, max_chars=500_000),
            *hostile_requests(VOCAB_SIZE, max_chars=100_000),
        ]
        for hostile in requests:
            async with s.http.post(
                s.url + hostile.path,
                data=io.BytesIO(hostile.body),
                headers={"Content-Type": hostile.content_type},
            ) as response:
                assert 400 <= response.status < 500, (hostile.name, await response.text())
                told = await response.json()
                error = told.get("error", told)  # of an update, only the message
                assert 0 < len(error["message"]) < 1000, hostile.name
        assert len(requests) > 300
        assert len(s.engine.embedded) == embedded, "a bad request reached the engine"
        assert s.front.num_live == 0
        assert (await s.post("/encode", {"text": "a"}))[0] == 200


@in_loop
async def test_a_batch_of_inputs(tmp_path: Any) -> None:
    lines = [
        {"custom_id": "good", "url": "/v1/embeddings", "body": {"input": ["ab", "c"]}},
        {"custom_id": "bytes", "url": "/v1/embeddings",
         "body": {"input": "ab", "encoding_format": "base64"}},
        {"custom_id": "bad", "url": "/v1/embeddings", "body": {"input": ""}},
    ]  # fmt: skip
    data = b"\n".join(map(orjson.dumps, lines))
    async with vector_server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        file = await client.files.create(file=("lines.jsonl", data), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )
        async with asyncio.timeout(10):
            while batch.status not in ("completed", "failed"):
                await asyncio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        text = (await client.files.content(batch.output_file_id)).text
        bodies = {
            answer["custom_id"]: answer["response"]["body"]
            for answer in map(orjson.loads, text.splitlines())
        }
        rows = bodies["good"]["data"]
        assert [row["embedding"] for row in rows] == [
            pytest.approx(vector("ab"), abs=1e-7),
            pytest.approx(vector("c"), abs=1e-7),
        ]
        assert _decoded(bodies["bytes"]["data"][0]["embedding"]) == vector("ab")
