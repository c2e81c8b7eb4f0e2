"""The routes that tell the engine to forget its cache, and to record what it does."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from sgl.actors.access import Level
from sgl.actors.endpoint import GENERATION, Endpoint, Handler
from sgl.actors.front import Front
from sgl.actors.http_body import read_body
from sgl.actors.questions import told
from sgl.protocol.body import convert, parse_fields
from sgl.protocol.profile import ProfileRequest

MAX_BODY_BYTES = 2**16


class EngineRoutes:
    """The handlers, and which is where. Raised is what the engine refuses."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def table(self) -> list[Endpoint]:
        rows: list[tuple[str, Handler, str, Any]] = [
            ("/flush_cache", self.flush_cache, "Forget all cached prefixes and grammars", None),
            ("/start_profile", self.start_profile, "Record what the workers do", ProfileRequest),
            ("/stop_profile", self.stop_profile, "Write what was recorded", None),
        ]
        return [
            Endpoint(
                "GET POST",
                path,
                Level.ADMIN,
                handler,
                summary,
                body=body,
                answer="text/plain",
                errors=GENERATION,
            )
            for path, handler, summary, body in rows
        ]

    async def flush_cache(self, request: web.Request) -> web.Response:
        return _text(told(await self._front.control("flush_cache")))

    async def start_profile(self, request: web.Request) -> web.Response:
        body = await read_body(request, MAX_BODY_BYTES)
        wanted = convert(parse_fields(body) if body else {}, ProfileRequest)
        return _text(told(await self._front.start_profile(wanted)))

    async def stop_profile(self, request: web.Request) -> web.Response:
        return _text(told(await self._front.stop_profile()))


def _text(text: str) -> web.Response:
    return web.Response(text=f"{text}\n")
