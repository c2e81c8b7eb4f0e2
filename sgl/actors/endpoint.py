"""A row of the route table: where it is, for whom, who answers, and what clients are told of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from aiohttp import web

from sgl.actors.access import Level

Handler: TypeAlias = "Callable[[web.Request], Awaitable[web.StreamResponse]]"

REFUSED = (400,)
NOT_READY = (503,)
GENERATION = (400, 500, 503)  # the engine fails, is still loading, has no room


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path, and all that openapi.py says of it.

    methods   in words: "GET POST"
    path      as aiohttp reads it, with `{name}` for a part that differs
    summary   what it does, in one line
    body      type of the JSON object that it reads
    example   such an object
    form      type that describes the fields of a multipart form that it reads
    query     type of its parameters
    answer    of a 200: a type whose JSON it is, or a content type; None: nothing
    events    types whose JSON the events of a stream are, if `stream` is true in the body
    errors    statuses besides those that the level, the path and the body bring with them
    refusal   type of a 400, where it need not have the form of errors
    """

    methods: str
    path: str
    level: Level
    handler: Handler
    summary: str
    body: Any = None
    example: Mapping[str, Any] | None = None
    form: Any = None
    query: Any = None
    answer: Any = None
    events: tuple[Any, ...] = ()
    errors: tuple[int, ...] = ()
    refusal: Any = None


def register(
    app: web.Application, endpoints: Iterable[Endpoint]
) -> dict[web.AbstractResource, Level]:
    """Let `app` serve them; says the level of each, for the check of access."""
    levels: dict[web.AbstractResource, Level] = {}
    for endpoint in endpoints:
        resource = app.router.add_resource(endpoint.path)
        levels[resource] = endpoint.level
        for method in endpoint.methods.split():
            resource.add_route(method, endpoint.handler)
    return levels
