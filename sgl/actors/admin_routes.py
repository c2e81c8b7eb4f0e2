"""The routes that change the running server: weights and logs. One table, short handlers."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from sgl.actors.access import Level
from sgl.actors.endpoint import GENERATION, Endpoint
from sgl.actors.http_body import read_body
from sgl.actors.middlewares import json_response
from sgl.actors.request_log import RequestLog
from sgl.actors.served_weights import ServedWeights
from sgl.errors import InvalidRequestError
from sgl.protocol.administration import LogRequest, WeightRequest, WeightsRequest
from sgl.protocol.answers import LogSettings, WeightsRefused, WeightsUpdated
from sgl.protocol.body import convert, parse_fields

MAX_BODY_BYTES = 2**16


class AdminRoutes:
    """For administrators alone."""

    def __init__(self, weights: ServedWeights, request_log: RequestLog) -> None:
        self.weights = weights
        self._request_log = request_log

    def table(self) -> list[Endpoint]:
        update = [
            Endpoint(
                "POST",
                path,
                Level.ADMIN,
                self.update_weights,
                "Load another checkpoint of the model",
                body=WeightsRequest,
                answer=WeightsUpdated,
                errors=GENERATION,
                refusal=WeightsRefused,
            )
            for path in ("/update_weights_from_disk", "/update_weights")
        ]
        return [
            *update,
            Endpoint(
                "GET POST",
                "/get_weights_by_name",
                Level.ADMIN,
                self.get_weight,
                "Look at a weight",
                body=WeightRequest,
                answer=list[Any],
                errors=GENERATION,
            ),
            Endpoint(
                "GET POST",
                "/configure_logging",
                Level.ADMIN,
                self.configure_logging,
                "What is logged, and written, of requests",
                body=LogRequest,
                answer=LogSettings,
            ),
        ]

    def settings(self) -> dict[str, Any]:
        """Settings that these routes may have changed since the start."""
        return self.weights.settings() | self._request_log.settings()

    async def update_weights(self, request: web.Request) -> web.Response:
        body = await read_body(request, MAX_BODY_BYTES)
        wanted = convert(parse_fields(body), WeightsRequest)
        try:
            text = await self.weights.update(wanted)
        except InvalidRequestError as error:
            return json_response({"success": False, "message": str(error)}, error.status)
        return json_response({"success": True, "message": text})

    async def get_weight(self, request: web.Request) -> web.Response:
        body = await read_body(request, MAX_BODY_BYTES)
        text = await self.weights.show(convert(parse_fields(body), WeightRequest))
        return web.Response(text=text, content_type="application/json")

    async def configure_logging(self, request: web.Request) -> web.Response:
        """Without a body nothing changes: it tells what is set."""
        body = await read_body(request, MAX_BODY_BYTES)
        wanted = convert(parse_fields(body) if body else {}, LogRequest)
        return json_response(await asyncio.to_thread(self._request_log.configure, wanted))
