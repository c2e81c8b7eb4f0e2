"""Every route is a row of the table, with a level and a line that says what it does."""

from __future__ import annotations

import pytest
from aiohttp import web
from fakes import in_loop
from ingress_server import server

from sgl.actors.access import Level
from sgl.actors.endpoint import Endpoint, register


@in_loop
async def test_every_row_says_for_whom_it_is_and_what_it_does() -> None:
    async with server() as s:
        rows = s.ingress.routes.table()
        assert len(rows) > 25
        for row in rows:
            assert isinstance(row.level, Level), row.path
            assert row.summary[:1].isalnum(), row.path
            assert not row.summary.endswith("."), row.path


def test_a_row_needs_a_level_and_a_summary() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response()

    with pytest.raises(TypeError, match="summary"):
        Endpoint("GET", "/x", Level.API, handler)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="level"):
        Endpoint(methods="GET", path="/x", handler=handler, summary="Nothing")  # type: ignore[call-arg]


@in_loop
async def test_nothing_is_served_but_the_table() -> None:
    async with server() as s:
        fresh = web.Application()
        register(fresh, s.ingress.routes.table())
        assert served(s.ingress.app) == served(fresh)


def served(app: web.Application) -> set[tuple[str, str]]:
    return {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None
    }
