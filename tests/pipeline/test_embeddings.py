"""Vectors from real processes: right on two ranks, in a crowd, and while clients leave."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from hostile import hostile_requests, hostile_vector_requests
from pipeline.server import Server, wait_until
from pipeline.test_hostile import post
from safetensors.torch import save_file
from tiny_models import checkpoint_tensors, write_config
from toy import CONTEXT_LEN, VOCAB_SIZE, toy_flags
from vector_bench import VectorBench

import sgl
from sgl.errors import InvalidRequestError, PromptTooLongError
from sgl.models.config import ModelConfig

TOLERANCE = 1e-4
NUM_CLIENTS = 200
SHARE_LEAVING = 0.3


def write_classifier(folder: Path, seed: int = 0) -> Path:
    changes = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    config = ModelConfig.load(write_config(folder, **changes))
    tensors = checkpoint_tensors(config, seed)
    head = tensors.pop("lm_head.weight")[:3].clone()
    save_file(tensors | {"score.weight": head}, folder / "model.safetensors")
    return folder


def test_two_ranks_give_the_scores_of_one_process(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "scores")
    chance = random.Random(1)
    prompts = [[chance.randrange(101) for _ in range(chance.randint(1, 120))] for _ in range(30)]
    prompts += [prompts[3][:50], [0] * 128]
    wanted = VectorBench(folder).vectors(prompts)
    flags = {"skip_tokenizer_init": True, "chunked_prefill_size": 48, "num_cpu_threads": 1}
    with sgl.Engine(model_path=str(folder), dtype="float32", tp_size=2, **flags) as engine:
        answers = engine.encode(input_ids=prompts)
        found = np.array([answer["embedding"] for answer in answers])
        assert np.abs(found - wanted).max() <= TOLERANCE
        alone = engine.encode(input_ids=prompts[5])
        assert alone["meta_info"]["cached_tokens"] == len(prompts[5]) - 1
        assert np.abs(np.array(alone["embedding"]) - wanted[5]).max() <= TOLERANCE
        assert len(asyncio.run(engine.async_encode(input_ids=[1]))["embedding"]) == 3
        with pytest.raises(InvalidRequestError, match="gives vectors of texts"):
            engine.generate(input_ids=[1])
        with pytest.raises(InvalidRequestError, match="gives vectors of texts"):
            engine.open_session(100)
        other = write_classifier(tmp_path / "other", seed=1)
        engine.update_weights_from_disk(other)
        answers = engine.encode(input_ids=prompts[:4])
        found = np.array([answer["embedding"] for answer in answers])
        assert np.abs(found - VectorBench(other).vectors(prompts[:4])).max() <= TOLERANCE
        assert len(engine.get_weights_by_name("score.weight")) == 3
        with pytest.raises(PromptTooLongError, match="longer than the model's context"):
            engine.encode(input_ids=[[1], [0] * 129])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("vectors")
    flags = [*toy_flags(folder / "toy"), "--is-embedding", "--chunked-prefill-size", "256"]
    with Server(flags, folder) as server:
        yield server


def num_in_engine(server: Server) -> float:
    return server.gauge("num_running_reqs") + server.gauge("num_queue_reqs")


class Crowd:
    """Clients that ask for vectors at once, many of whom leave."""

    def __init__(self, server: Server, http: aiohttp.ClientSession) -> None:
        self._url = f"http://127.0.0.1:{server.port}/v1/embeddings"
        self._http = http
        self.num_left = 0

    async def ask(self, prompts: list[list[int]]) -> np.ndarray:
        async with self._http.post(self._url, json={"input": prompts}) as response:
            assert response.status == 200, await response.text()
            rows = (await response.json())["data"]
        return np.array([row["embedding"] for row in rows])

    async def ask_and_leave(self, prompts: list[list[int]], after_s: float) -> None:
        asking = asyncio.create_task(self.ask(prompts))
        await asyncio.wait([asking], timeout=after_s)
        self.num_left += not asking.done()
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking


def make_prompt(chance: random.Random) -> list[int]:
    """Most are short; some take several steps, and some begin alike."""
    length = chance.randint(300, CONTEXT_LEN) if chance.random() < 0.1 else chance.randint(1, 60)
    start = list(range(40)) if chance.random() < 0.3 else []
    return (start + [chance.randrange(VOCAB_SIZE) for _ in range(length)])[:CONTEXT_LEN]


def test_in_a_crowd_vectors_are_those_of_a_prompt_alone(server: Server) -> None:
    chance = random.Random(4)
    asked = [[make_prompt(chance) for _ in range(chance.randint(1, 3))] for _ in range(NUM_CLIENTS)]

    async def ask_all() -> tuple[list[Any], list[np.ndarray], int]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            crowd = Crowd(server, http)
            together = await asyncio.gather(
                *(
                    crowd.ask_and_leave(prompts, chance.uniform(0, 0.5))
                    if chance.random() < SHARE_LEAVING
                    else crowd.ask(prompts)
                    for prompts in asked
                )
            )
            assert await asyncio.to_thread(wait_until, lambda: num_in_engine(server) == 0, 5.0)
            assert server.post("/flush_cache")[0] == 200
            alone = [await crowd.ask(prompts) for prompts in asked[:20]]
            return together, alone, crowd.num_left

    together, alone, num_left = asyncio.run(ask_all())
    assert num_left > 20
    pairs = [(many, one) for many, one in zip(together, alone, strict=False) if many is not None]
    assert len(pairs) > 8
    for many, one in pairs:
        np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1.0, atol=1e-6)
        assert np.abs(many - one).max() <= TOLERANCE
    assert server.post("/flush_cache")[0] == 200
    assert server.gauge("num_used_tokens") == 0
    assert "Abort" in server.log
    assert "Traceback" not in server.log


def encode(server: Server, texts: list[str]) -> np.ndarray:
    status, body = server.post("/encode", {"text": texts})
    assert status == 200
    return np.array([answer["embedding"] for answer in json.loads(body)])


def test_hostile_requests_are_refused_and_change_nothing(server: Server) -> None:
    before = encode(server, ["once", "upon a time"])
    connection = server.connection()
    try:
        requests = [
            *hostile_vector_requests(VOCAB_SIZE),
            *hostile_requests(VOCAB_SIZE, max_chars=10_000),
        ]
        faults = [fault for request in requests if (fault := post(connection, request))]
    finally:
        connection.close()
    assert not faults, "\n".join(faults)
    assert server.get("/health_generate")[0] == 200
    assert np.abs(encode(server, ["once", "upon a time"]) - before).max() <= TOLERANCE
    assert "Traceback" not in server.log
