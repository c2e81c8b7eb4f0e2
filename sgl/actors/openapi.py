"""The description of the HTTP API for programs, OpenAPI 3.1, made of the route table.

Endpoint, its types ──▶ operations and components ──▶ /openapi.json
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from sgl.actors.access import ADMIN_KEY, API_KEY, Level
from sgl.actors.endpoint import Endpoint
from sgl.protocol import answers
from sgl.protocol.json_schema import schemas_of
from sgl.protocol.sampling_schema import SamplingSchema

Json: TypeAlias = dict[str, Any]
KeysOf: TypeAlias = "Callable[[Level], Sequence[str]]"

JSON, EVENTS, FORM = "application/json", "text/event-stream", "multipart/form-data"
ERRORS = {
    400: "A field is wrong, or what is asked for cannot be",
    401: "The key is missing or wrong",
    403: "This needs the admin level",
    404: "There is no such thing",
    408: "The body did not come in time",
    413: "The body is too large",
    499: "Somebody aborted it by its rid",
    500: "The engine, or the disk, failed on this request",
    503: "The server is loading, stopping, or has too many requests",
}
_BODY_ERRORS = (400, 408, 413)
_PART = re.compile(r"\{(\w+)(?::[^}]*)?\}")  # of a path, with what aiohttp matches it by
_TEXT = {"type": "string"}
_INTRODUCTION = """\
A server for large language models. Paths under /v1 are those of OpenAI's API, /generate and the
others those of SGLang. Any path answers OPTIONS with 204, an unknown one with 404, a method that it
does not have with 405; errors have the form that is described for 400."""


def describe(endpoints: Iterable[Endpoint], version: str, keys_of: KeysOf) -> Json:
    """The whole document.

    keys_of   the keys that open a level, by the names of security schemes; none: no key is needed
    """
    endpoints = list(endpoints)
    types = _Types(endpoints)
    paths: Json = {}
    for endpoint in endpoints:
        path = paths.setdefault(_PART.sub(r"{\1}", endpoint.path), {})
        for method in endpoint.methods.split():
            path[method.lower()] = _operation(endpoint, method, types, keys_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sgl", "version": version, "description": _INTRODUCTION},
        "paths": paths,
        "components": {
            "schemas": types.components,
            "securitySchemes": {
                name: {"type": "http", "scheme": "bearer", "description": f"the key of {flag}"}
                for name, flag in ((API_KEY, "--api-key"), (ADMIN_KEY, "--admin-api-key"))
            },
        },
    }


class _Types:
    """The schemas of all types that the table names."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        found = [SamplingSchema, answers.NativeError, answers.NativeUnauthorized]
        found.append(answers.OpenAiError)
        for endpoint in endpoints:
            parts = (
                endpoint.body,
                endpoint.form,
                endpoint.query,
                endpoint.answer,
                endpoint.refusal,
            )
            found += [part for part in (*parts, *endpoint.events) if _is_type(part)]
        schemas, self.components = schemas_of(found)
        self._schemas = dict(zip(map(repr, found), schemas, strict=True))

    def schema(self, found: Any) -> Json:
        return self._schemas[repr(found)]

    def fields(self, found: Any) -> Json:
        """The schemas of the fields of a struct."""
        fields: Json = self.components[found.__name__]["properties"]
        return fields


def _is_type(part: Any) -> bool:
    return part is not None and not isinstance(part, str)


def _operation(endpoint: Endpoint, method: str, types: _Types, keys_of: KeysOf) -> Json:
    keys = keys_of(endpoint.level)
    operation: Json = {
        "operationId": "_".join([method.lower(), *re.findall(r"\w+", endpoint.path)]),
        "summary": endpoint.summary,
        "tags": [_tag(endpoint)],
        "security": [{key: []} for key in keys],
    }
    if parameters := list(_parameters(endpoint, types)):
        operation["parameters"] = parameters
    if _reads_body(endpoint, method):
        operation["requestBody"] = _request_body(endpoint, types)
    operation["responses"] = {"200": _success(endpoint, types)} | {
        str(status): _error(status, endpoint, types)
        for status in sorted(_statuses(endpoint, method, has_keys=bool(keys)))
    }
    return operation


def _tag(endpoint: Endpoint) -> str:
    match endpoint.level:
        case Level.PUBLIC:
            return "state"
        case Level.ADMIN:
            return "administration"
        case Level.API:
            return "OpenAI" if endpoint.path.startswith("/v1/") else "SGLang"


def _reads_body(endpoint: Endpoint, method: str) -> bool:
    return method != "GET" and (endpoint.body or endpoint.form) is not None


def _parameters(endpoint: Endpoint, types: _Types) -> Iterator[Json]:
    for name in _PART.findall(endpoint.path):
        yield {"name": name, "in": "path", "required": True, "schema": _TEXT}
    for name, schema in types.fields(endpoint.query).items() if endpoint.query else ():
        words = {"description": schema["description"]}
        yield {"name": name, "in": "query", "schema": schema} | words


def _request_body(endpoint: Endpoint, types: _Types) -> Json:
    if endpoint.form is not None:
        return {"required": True, "content": {FORM: {"schema": types.schema(endpoint.form)}}}
    content: Json = {"schema": types.schema(endpoint.body)}
    if endpoint.example is not None:
        content["example"] = endpoint.example
    is_required = bool(types.components[endpoint.body.__name__]["required"]) or endpoint.example
    return {"required": bool(is_required), "content": {JSON: content}}


def _success(endpoint: Endpoint, types: _Types) -> Json:
    answer, content = endpoint.answer, {}
    if isinstance(answer, str):
        content[answer] = {"schema": _TEXT}
    elif answer is not None:
        content[JSON] = {"schema": types.schema(answer)}
    if endpoint.events:
        content[EVENTS] = {"schema": _event([types.schema(each) for each in endpoint.events])}
    return {"description": "It went well"} | ({"content": content} if content else {})


def _event(payloads: list[Json]) -> Json:
    """One event of a stream: a line of JSON, or the word that ends the stream."""
    schema = {"anyOf": payloads}
    line = {"type": "string", "contentMediaType": JSON, "contentSchema": schema}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, line]}},
    }


def _statuses(endpoint: Endpoint, method: str, *, has_keys: bool) -> set[int]:
    """Of errors; 403 is what somebody gets whose key, or address, is good for less."""
    found = set(endpoint.errors)
    if endpoint.level is Level.API and has_keys:
        found |= {401}
    if endpoint.level is Level.ADMIN:
        found |= {401, 403}
    if _reads_body(endpoint, method):
        found |= set(_BODY_ERRORS)
    if endpoint.query is not None:
        found |= {400}
    if _PART.search(endpoint.path):
        found |= {404}
    return found


def _error(status: int, endpoint: Endpoint, types: _Types) -> Json:
    is_openai = endpoint.path.startswith("/v1/")
    form: Any = answers.OpenAiError if is_openai else answers.NativeError
    if status == 401 and not is_openai:
        form = answers.NativeUnauthorized
    if status == 400 and endpoint.refusal is not None:
        form = endpoint.refusal
    response: Json = {
        "description": ERRORS[status],
        "content": {JSON: {"schema": types.schema(form)}},
    }
    if status == 503:
        response["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer"}}}
    return response
