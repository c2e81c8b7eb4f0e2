"""The routes that say how the server is: for load balancers and dashboards, which have no key."""

from __future__ import annotations

import asyncio

from aiohttp import web

from sgl.actors.access import Level
from sgl.actors.connections import StallWatch
from sgl.actors.endpoint import NOT_READY, Endpoint
from sgl.actors.front import Front
from sgl.actors.gate import Gate
from sgl.errors import OverloadedError, RequestError
from sgl.metrics import CONTENT_TYPE, Metrics
from sgl.protocol.body import id_array
from sgl.protocol.call import GenerationCall, PromptCall
from sgl.sampling_params import SamplingParams

PROBE_TIMEOUT_S = 20.0


class StateRoutes:
    """The handlers, and which is where."""

    def __init__(self, front: Front, gate: Gate, metrics: Metrics, stall: StallWatch) -> None:
        self._front = front
        self._gate = gate
        self._metrics = metrics
        self._stall = stall

    def table(self) -> list[Endpoint]:
        rows = [
            ("/health", self.ready, "200 when requests are taken"),
            ("/health/ready", self.ready, "The same as /health"),
            ("/health/live", self.live, "503 when the engine has died or stalls"),
            (
                "/health_generate",
                self.health_generate,
                "200 when the engine answers in time",
            ),
        ]
        return [
            *(
                Endpoint("GET", path, Level.PUBLIC, handler, summary, errors=NOT_READY)
                for path, handler, summary in rows
            ),
            Endpoint(
                "GET",
                "/metrics",
                Level.PUBLIC,
                self.metrics,
                "Metrics for Prometheus",
                answer="text/plain",
            ),
        ]

    async def ready(self, request: web.Request) -> web.Response:
        if not self._gate.is_ready:
            self._gate.check()
            raise OverloadedError("the server is about to stop")
        return await self.live(request)

    async def live(self, request: web.Request) -> web.Response:
        if self._front.is_dead or self._stall.is_stalled:
            raise OverloadedError("the engine has died, or makes no step")
        return web.Response()

    async def health_generate(self, request: web.Request) -> web.Response:
        """200 if the engine makes a token, or a vector, within a few seconds."""
        try:
            self._gate.check()
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await generate_quietly(self._front, [0], num_tokens=1)
        except (RequestError, TimeoutError) as error:
            raise OverloadedError(f"the engine makes nothing: {error!s:.200}") from None
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def generate_quietly(front: Front, prompt: str | list[int], num_tokens: int) -> None:
    """A request of the server's own, whose answer nobody reads; raises RequestError."""
    call = PromptCall(
        prompt=prompt if isinstance(prompt, str) else id_array(prompt, "prompt"),
        sampling=SamplingParams(max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True),
    )
    whole = GenerationCall(prompts=(call,), wants_vectors=front.is_pooled)
    async with await front.submit(whole) as running:
        [answer] = await running.finished()
    if answer.failure is not None:
        raise answer.failure
