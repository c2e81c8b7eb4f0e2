"""A row of the route table: where it is, for whom, who answers, and what clients are told of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from aiohttp import web

from sgl.actors.access import Level

Handler: TypeAlias = "Callable[[web.Request], Awaitable[web.StreamResponse]]"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """
    methods   in words: "GET POST"
    path      as aiohttp reads it, with `{name}` for a part that differs
    summary   what it does, in one line
    """

    methods: str
    path: str
    level: Level
    handler: Handler
    summary: str


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
