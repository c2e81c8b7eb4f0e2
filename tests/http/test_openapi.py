"""/openapi.json: complete, and true of what the handlers answer."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest
import schemathesis
from fakes import in_loop
from ingress_server import Server, in_thread, server
from schemathesis.config import GenerationConfig
from schemathesis.engine import events, from_schema

Json = dict[str, Any]
MAY_ANSWER_MORE = {"ServerInfo"}  # administrators get settings besides
VERBS = ("POST", "PUT")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
)


async def document(s: Server) -> Json:
    async with s.http.get(s.url + "/openapi.json") as response:
        assert response.status == 200
        found: Json = await response.json()
    return found


def operations(described: Json) -> Iterator[tuple[str, Json]]:
    for path, item in described["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def answer_names(described: Json) -> set[str]:
    """The components that answers are made of."""
    seen: set[str] = set()
    found = [operation["responses"] for _, operation in operations(described)]
    while found:
        part = found.pop()
        if isinstance(part, dict):
            name = part.get("$ref", "").rpartition("/")[2]
            if name and name not in seen:
                seen.add(name)
                found.append(described["components"]["schemas"][name])
            found += part.values()
        elif isinstance(part, list):
            found += part
    return seen


def closed(described: Json) -> Json:
    """The description, made stricter: answers have no fields that it does not name."""
    strict = copy.deepcopy(described)
    for name in answer_names(described) - MAY_ANSWER_MORE:
        strict["components"]["schemas"][name]["additionalProperties"] = False
    return strict


@in_loop
async def test_it_is_openapi_and_describes_every_route_for_everybody() -> None:
    async with server(api_key="key", admin_api_key="admin") as s:
        described = await document(s)
        schemathesis.openapi.from_dict(described).validate()
        described_routes = {name.replace("{id}", "{}") for name, _ in operations(described)}
        rows = s.ingress.routes.table()
        assert described_routes == {
            f"{method} {row.path.replace('{id:.+}', '{}').replace('{id}', '{}')}"
            for row in rows
            for method in row.methods.split()
        }
        names = [operation["operationId"] for _, operation in operations(described)]
        assert len(set(names)) == len(names)


@in_loop
async def test_every_field_of_a_request_has_a_description() -> None:
    async with server() as s:
        described = await document(s)
        components = described["components"]["schemas"]
        bodies = set(components) - answer_names(described)
        assert {"GenerateBody", "SamplingParams", "ChatBody", "Message", "UploadForm"} <= bodies
        bare = [
            f"{name}.{field}"
            for name in sorted(bodies)
            for field, schema in components[name]["properties"].items()
            if not schema.get("description")
        ]
        assert bare == []
        assert [name for name in sorted(bodies) if not components[name]["description"]] == []


@in_loop
async def test_types_defaults_and_limits_are_those_of_the_parser() -> None:
    async with server() as s:
        components = (await document(s))["components"]["schemas"]
        sampling = components["SamplingParams"]
        assert sampling["additionalProperties"] is False
        assert sampling["properties"]["temperature"] == {
            "anyOf": [{"type": "number", "minimum": 0.0, "maximum": 1e6}, {"type": "null"}],
            "default": 1.0,
            "description": "0 is greedy",
        }
        chat = components["ChatBody"]
        assert chat["required"] == ["messages"]
        assert chat["properties"]["temperature"]["default"] == 0.7
        assert chat["properties"]["top_logprobs"]["anyOf"][0]["maximum"] == 20
        assert set(components["ResponseFormat"]["properties"]["type"]["enum"]) == {
            "text",
            "json_object",
            "json_schema",
            "structural_tag",
        }


@pytest.mark.parametrize(
    ("keys", "api", "admin"),
    [
        ({}, [], []),
        ({"api_key": "k"}, [{"api_key": []}], [{"api_key": []}]),
        ({"admin_api_key": "k"}, [], [{"admin_key": []}]),
        (
            {"api_key": "k", "admin_api_key": "a"},
            [{"api_key": []}, {"admin_key": []}],
            [{"admin_key": []}],
        ),
    ],
)
@in_loop
async def test_it_says_which_keys_this_server_asks_for(
    keys: dict[str, str], api: list[Json], admin: list[Json]
) -> None:
    async with server(**keys) as s:
        paths = (await document(s))["paths"]
        assert paths["/health"]["get"]["security"] == []
        assert paths["/generate"]["post"]["security"] == api
        assert ("401" in paths["/generate"]["post"]["responses"]) is bool(api)
        assert paths["/flush_cache"]["post"]["security"] == admin
        assert {"401", "403"} <= set(paths["/flush_cache"]["post"]["responses"])


def checker(described: Json, path: str, method: str = "post", status: int = 200) -> Any:
    """Checks the JSON of an answer."""
    content = described["paths"][path][method]["responses"][str(status)]["content"]
    return jsonschema.Draft202012Validator(
        content["application/json"]["schema"] | {"components": described["components"]}
    )


def event_checker(described: Json, path: str) -> Any:
    content = described["paths"][path]["post"]["responses"]["200"]["content"]
    line = content["text/event-stream"]["schema"]["properties"]["data"]["anyOf"][1]
    return jsonschema.Draft202012Validator(
        line["contentSchema"] | {"components": described["components"]}
    )


RICH: dict[str, list[Json]] = {
    "/generate": [
        {"text": ["a", "b"], "sampling_params": {"n": 2, "max_new_tokens": 2, "stop": "c"}},
        {
            "text": "abc",
            "sampling_params": {"max_new_tokens": 2},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 2,
            "token_ids_logprob": [5, 6],
            "return_text_in_logprobs": True,
        },
    ],
    "/v1/completions": [
        {"prompt": "abc", "max_tokens": 2, "logprobs": 2, "echo": True, "n": 2, "stop": "e"},
        {"prompt": [97], "stream_options": {"include_usage": True}},
    ],
    "/v1/chat/completions": [
        {
            "messages": [{"role": "user", "content": "ab"}],
            "max_tokens": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "stream_options": {"include_usage": True},
        },
    ],
}


@pytest.mark.parametrize(
    ("path", "body"), [(path, body) for path, bodies in RICH.items() for body in bodies]
)
@in_loop
async def test_answers_and_events_with_everything_in_them_are_as_described(
    path: str, body: Json
) -> None:
    async with server(enable_cache_report=True) as s:
        described = closed(await document(s))
        status, answer = await s.post(path, body)
        assert status == 200
        checker(described, path).validate(answer)
        s.engine.fail_next("the logits were NaN", 500)
        failed = await s.events(path, body)
        for event in [*await s.events(path, body), *failed]:
            event_checker(described, path).validate(event)
        assert "error" in failed[-1]


@in_loop
async def test_files_and_batches_are_as_described(tmp_path: Path) -> None:
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        described = closed(await document(s))
        lines = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"x": 1}}'
        file = await client.files.create(file=("lines.jsonl", lines), purpose="batch")
        wanted = {
            "input_file_id": file.id,
            "endpoint": "/v1/completions",
            "completion_window": "24h",
            "metadata": {"a": "b"},
        }
        status, batch = await s.post("/v1/batches", wanted)
        assert status == 200
        checker(described, "/v1/batches").validate(batch)
        empty = await client.files.create(file=("none.jsonl", b"\n"), purpose="batch")
        await s.post("/v1/batches", wanted | {"input_file_id": empty.id})
        for path in ("/v1/files", "/v1/batches", "/v1/models"):
            async with s.http.get(s.url + path) as response:
                told = orjson.loads(await response.read())
            assert told["data"]
            checker(described, path, "get").validate(told)
        async with s.http.delete(f"{s.url}/v1/files/{empty.id}") as response:
            status, told = response.status, orjson.loads(await response.read())
        checker(described, "/v1/files/{id}", "delete", status).validate(told)


def test_2000_generated_requests_are_answered_as_described(tmp_path: Path, is_full: bool) -> None:
    """Right and wrong values of every field; nothing is a server error, nothing takes long."""
    keys = {"api_key": "key", "admin_api_key": "admin-key"}
    with in_thread(file_storage_path=str(tmp_path), max_batch_requests=64, **keys) as s:
        described = closed(s.ingress.routes.described)
        statuses, failures = exercise(described, s.url, max_examples=100 if is_full else 5)
    assert failures == []
    assert statuses.total() >= 2000
    assert {status // 100 for _, status in statuses} == {2, 4}
    working = {name for name, status in statuses if status == 200}
    idle = {name for name, _ in operations(described)} - working
    needs_file = {"POST /v1/batches", "POST /v1/batches/{id}/cancel", "GET /v1/batches/{id}"}
    needs_weights = {"POST /update_weights_from_disk", "POST /update_weights"}
    needs_name = {"POST /get_weights_by_name", "GET /get_weights_by_name"}
    needs_body = {"GET /open_session", "GET /close_session"}  # which are not described for a GET
    of_vectors = {f"{method} {path}" for path in ("/encode", "/classify") for method in VERBS}
    needs_vectors = {*of_vectors, "POST /v1/embeddings"}
    assert idle == {
        *needs_file,
        *needs_weights,
        *needs_name,
        *needs_body,
        *needs_vectors,
        "PUT /generate",
    }


def test_requests_for_vectors_are_answered_as_described(is_full: bool) -> None:
    paths = ("/encode", "/classify", "/v1/embeddings")
    with in_thread(vector_sizes=(2, 4), max_batch_requests=64) as s:
        described = closed(s.ingress.routes.described)
        described["paths"] = {path: described["paths"][path] for path in paths}
        statuses, failures = exercise(described, s.url, max_examples=100 if is_full else 5)
    assert failures == []
    assert {name for name, status in statuses if status == 200} == {f"POST {it}" for it in paths}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/encode", {"text": "abc"}),
        ("/classify", {"input_ids": [[1], [2, 3]], "rid": ["a", "b"], "cache_salt": "s"}),
        ("/v1/embeddings", {"input": ["abc", "d"], "dimensions": 2, "user": "me"}),
        ("/v1/embeddings", {"input": [97], "encoding_format": "base64"}),
    ],
)
@in_loop
async def test_vectors_are_as_described(path: str, body: Json) -> None:
    async with server(vector_sizes=(2, 4)) as s:
        status, answer = await s.post(path, body)
        assert status == 200
        checker(closed(await document(s)), path).validate(answer)


def test_an_untrue_description_is_noticed() -> None:
    with in_thread() as s:
        described = closed(s.ingress.routes.described)
        described["paths"] = {"/get_model_info": described["paths"]["/get_model_info"]}
        info = described["components"]["schemas"]["ModelInfo"]
        del info["properties"]["model_path"]
        info["required"].remove("model_path")
        _, failures = exercise(described, s.url, max_examples=1)
    assert any("model_path" in failure for failure in failures)


def exercise(
    described: Json, url: str, max_examples: int
) -> tuple[Counter[tuple[str, int]], list[str]]:
    """How often each operation gave each status, and what was not as described."""
    schema = schemathesis.openapi.from_dict(described).exclude(method="PUT")  # the same as POST
    config = schema.config
    config.update(base_url=url, headers={"Authorization": "Bearer admin-key"}, request_timeout=10)
    config.generation = GenerationConfig(
        max_examples=max_examples, deterministic=True, database="none", no_shrink=True
    )
    config.continue_on_failure = True
    config.phases.stateful.enabled = False
    config.checks.update(included_check_names=CHECKS)
    statuses: Counter[tuple[str, int]] = Counter()
    failures: list[str] = []
    for event in from_schema(schema).execute():
        match event:
            case events.ScenarioFinished(recorder=recorder):
                for made in recorder.interactions.values():
                    assert made.response is not None, f"{recorder.label}: no answer in time"
                    statuses[recorder.label, made.response.status_code] += 1
                failures += [
                    f"{recorder.label} {recorder.cases[key].value.body!r:.200}: {each.failure_info}"
                    for key, checks in recorder.checks.items()
                    for each in checks
                    if each.failure_info is not None
                ]
            case events.NonFatalError() | events.FatalError():
                failures.append(str(event))
    return statuses, failures
