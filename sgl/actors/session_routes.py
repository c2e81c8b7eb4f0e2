"""The routes of sessions: one table, and a short handler for each row."""

from __future__ import annotations

from aiohttp import web

from sgl.actors.access import Level
from sgl.actors.endpoint import NOT_READY, REFUSED, Endpoint
from sgl.actors.front import Front
from sgl.actors.gate import Gate
from sgl.actors.http_body import read_body
from sgl.actors.middlewares import json_response
from sgl.protocol.body import convert, parse_fields
from sgl.protocol.session import CloseSession, OpenSession

MAX_BODY_BYTES = 2**16


class SessionRoutes:
    """Requests of a session come through `/generate`."""

    def __init__(self, front: Front, gate: Gate) -> None:
        self._front = front
        self._gate = gate

    def table(self) -> list[Endpoint]:
        return [
            Endpoint(
                "GET POST",
                "/open_session",
                Level.API,
                self.open_session,
                "Begin a conversation that the server keeps",
                body=OpenSession,
                answer=str,
                errors=REFUSED + NOT_READY,
            ),
            Endpoint(
                "GET POST",
                "/close_session",
                Level.API,
                self.close_session,
                "Forget a conversation",
                body=CloseSession,
                errors=REFUSED,
            ),
        ]

    async def open_session(self, request: web.Request) -> web.Response:
        self._gate.check()
        body = await read_body(request, MAX_BODY_BYTES)
        return json_response(self._front.open_session(convert(parse_fields(body), OpenSession)))

    async def close_session(self, request: web.Request) -> web.Response:
        body = await read_body(request, MAX_BODY_BYTES)
        self._front.sessions.close(convert(parse_fields(body), CloseSession).session_id)
        return web.Response()
