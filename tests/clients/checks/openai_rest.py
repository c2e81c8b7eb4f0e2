"""openai: models, raw responses, files and batches."""

from __future__ import annotations

import io
import json
from typing import Any

import openai

from checks.common import ANSWER, API_KEY, BASE_URL, SHORT
from checks.openai_client import client, content, raised, wait_until

ENDPOINT = "/v1/chat/completions"


def check_models() -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == ("demo/SmolLM2-135M-Instruct", "model")
    assert model.model_dump()["max_model_len"] == 8192


def check_one_model() -> None:
    """Its name has a slash, as those of the hub have."""
    [listed] = client.models.list()
    assert client.models.retrieve(listed.id) == listed
    assert client.models.retrieve("default") == listed


def check_the_environment_is_enough() -> None:
    plain = openai.OpenAI()
    assert str(plain.base_url).rstrip("/") == BASE_URL
    assert content(plain.chat.completions.create(**(SHORT | {"max_tokens": 2}))) == "The capital"


def check_raw_response() -> None:
    raw = client.chat.completions.with_raw_response.create(**SHORT)
    assert (raw.status_code, raw.headers["content-type"]) == (200, "application/json")
    assert raw.headers["x-request-id"] == raw.request_id
    assert content(raw.parse()) == ANSWER
    assert json.loads(raw.text)["choices"][0]["message"]["content"] == ANSWER


def check_the_request_id_is_mine() -> None:
    raw = client.models.with_raw_response.list(extra_headers={"X-Request-Id": "my-request-1"})
    assert raw.headers["x-request-id"] == "my-request-1"


def check_extra_query_and_headers_do_no_harm() -> None:
    other = client.with_options(
        default_headers={"OpenAI-Organization": "o"},
        default_query={"api-version": "1"},
    )
    assert content(other.chat.completions.create(**(SHORT | {"max_tokens": 2}))) == "The capital"


def check_a_connection_is_used_again() -> None:
    with openai.OpenAI(base_url=BASE_URL, api_key=API_KEY) as own:
        ids = {own.models.with_raw_response.list().request_id for _ in range(3)}
    assert len(ids) == 3


def check_files() -> None:
    data = "{}\n" * 3 + "größe\n"
    file = client.files.create(file=("größe.jsonl", data.encode()), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(data.encode()), "größe.jsonl", "batch")
    assert client.files.retrieve(file.id) == file
    assert file.id in {listed.id for listed in client.files.list(purpose="batch")}
    assert client.files.content(file.id).text == data
    assert client.files.delete(file.id).deleted
    raised(openai.NotFoundError, client.files.retrieve, file.id)


def check_a_file_from_a_stream() -> None:
    stream = io.BytesIO(b"{}\n")
    stream.name = "lines.jsonl"
    file = client.files.create(file=stream, purpose="batch")
    assert (file.filename, file.bytes) == ("lines.jsonl", 3)
    assert client.files.content(file.id).read() == b"{}\n"
    client.files.delete(file.id)


def check_files_are_listed_page_by_page() -> None:
    """Others upload files at the same time."""
    made = [client.files.create(file=("x", b"x"), purpose="batch").id for _ in range(3)]

    def listed(**query: Any) -> list[str]:
        return [file.id for file in client.files.list(extra_query=query).data]

    assert [found for found in listed(order="asc") if found in made] == made
    assert [found for found in listed(order="asc", after=made[0]) if found in made] == made[1:]
    assert [found for found in listed(order="desc", after=made[2]) if found in made] == made[1::-1]
    assert len(listed(limit=2)) == 2
    for file_id in made:
        client.files.delete(file_id)


def upload(*bodies: dict[str, Any]) -> str:
    lines = [
        {"custom_id": f"line {number}", "method": "POST", "url": ENDPOINT, "body": body}
        for number, body in enumerate(bodies)
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    return client.files.create(file=("in.jsonl", data), purpose="batch").id


def start(file_id: str, **more: Any) -> Any:
    return client.batches.create(
        input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h", **more
    )


def status(batch_id: str) -> str:
    return client.batches.retrieve(batch_id).status


def lines_of(file_id: str) -> dict[str, Any]:
    lines = map(json.loads, client.files.content(file_id).text.splitlines())
    return {line["custom_id"]: line["response"] for line in lines}


def check_a_batch() -> None:
    made = start(upload(SHORT, SHORT | {"max_tokens": 2}), metadata={"mine": "yes"})
    assert (made.object, made.endpoint, made.metadata) == ("batch", ENDPOINT, {"mine": "yes"})
    wait_until(lambda: status(made.id) == "completed", 60.0)
    done = client.batches.retrieve(made.id)
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (2, 2, 0)
    assert done.error_file_id is None
    answers = lines_of(done.output_file_id)
    texts = {name: a["body"]["choices"][0]["message"]["content"] for name, a in answers.items()}
    assert texts == {"line 0": ANSWER, "line 1": "The capital"}
    assert made.id in {batch.id for batch in client.batches.list(limit=2)}


def check_a_batch_with_a_wrong_line() -> None:
    made = start(upload(SHORT | {"max_tokens": 2}, SHORT | {"temperature": -1}))
    wait_until(lambda: status(made.id) == "completed", 60.0)
    done = client.batches.retrieve(made.id)
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 1)
    [(name, response)] = lines_of(done.error_file_id).items()
    assert (name, response["status_code"]) == ("line 1", 400)
    assert response["body"]["error"]["param"] == "temperature"


def check_cancelling_a_batch() -> None:
    made = start(upload(SHORT | {"max_tokens": 4000, "ignore_eos": True}))
    wait_until(lambda: status(made.id) == "in_progress")
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    wait_until(lambda: status(made.id) == "cancelled")
    error = raised(openai.BadRequestError, client.batches.cancel, made.id)
    assert "cancelled" in error.message


def check_a_batch_of_nothing() -> None:
    error = raised(openai.BadRequestError, start, "file-nope")
    assert error.param == "input_file_id"
    assert "file-nope" in error.message
