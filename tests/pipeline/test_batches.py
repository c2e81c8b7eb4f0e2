"""A batch through whole servers that are ended while it runs, politely or not at all."""

from __future__ import annotations

import signal
from pathlib import Path

import openai
import orjson
import pytest
from openai.types import Batch
from pipeline.server import Server, wait_until
from toy import toy_flags

NUM_LINES = 150
NUM_TOKENS = 40
ENDED_AFTER_S = 60.0


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x", max_retries=0)


def input_lines() -> bytes:
    body = {"prompt": "Once", "temperature": 0, "ignore_eos": True, "max_tokens": NUM_TOKENS}
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
        for number in range(NUM_LINES)
    ]
    return b"\n".join(map(orjson.dumps, lines))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_batch_goes_on_after_the_server_has_ended(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    flags = [*toy_flags(tmp_path / "toy"), "--file-storage-path", str(folder)]
    with Server(flags, tmp_path) as server, client_of(server) as client:
        file = client.files.create(file=("in.jsonl", input_lines()), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )

        def num_answered() -> int:
            counts = client.batches.retrieve(made.id).request_counts
            return counts.completed if counts else 0

        assert wait_until(lambda: num_answered() > 0, ENDED_AFTER_S)
        server.signal("supervisor", number)
        assert wait_until(lambda: not server.leftovers(), ENDED_AFTER_S), server.leftovers()
    assert orjson.loads((folder / f"{made.id}.json").read_bytes())["status"] == "in_progress"
    num_kept = (folder / f"{made.id}.output.part").read_bytes().count(b"\n")
    assert 0 < num_kept < NUM_LINES
    with Server(flags, tmp_path) as server, client_of(server) as client:
        done: list[Batch] = []

        def has_ended() -> bool:
            done[:] = [client.batches.retrieve(made.id)]
            return done[0].status == "completed"

        assert wait_until(has_ended, ENDED_AFTER_S), server.log
        assert done[0].output_file_id is not None
        told = client.files.content(done[0].output_file_id).content.splitlines()
        answers = {answer["custom_id"]: answer["response"] for answer in map(orjson.loads, told)}
        assert len(told) == len(answers) == NUM_LINES
        texts = {answer["body"]["choices"][0]["text"] for answer in answers.values()}
        assert len(texts) == 1  # the same before and after
        usages = {answer["body"]["usage"]["completion_tokens"] for answer in answers.values()}
        assert usages == {NUM_TOKENS}
        assert f"Going on with {made.id}" in server.log
