"""A call as one HTTP response: JSON at the end, or a stream of events while it runs."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import web

from sgl.actors.front import Front
from sgl.actors.middlewares import REQUEST_ID, json_response
from sgl.actors.running_call import RunningCall
from sgl.errors import RequestError
from sgl.protocol import sse
from sgl.protocol.call import Answer, GenerationCall, Reply, WholeReply

logger = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 30.0  # a client that reads nothing for so long has left


async def answer_call(
    request: web.Request,
    front: Front,
    call: GenerationCall,
    reply: Reply,
    write_timeout_s: float = WRITE_TIMEOUT_S,
) -> web.StreamResponse:
    """Run `call`. If the client leaves, this is cancelled, and with it the call."""
    async with await front.submit(call) as running:
        if call.stream:
            if any(prompt.grammar for prompt in call.prompts):
                # a grammar that does not compile is refused with a status, not in the stream
                await running.begun()
                for answer in running.answers:
                    _raise_failure(answer)
            return await _Stream(request, reply, write_timeout_s).send(running)
        return json_response(await whole_answer(running, reply))


async def whole_answer(running: RunningCall, reply: WholeReply) -> Any:
    """The JSON of the finished call; raises RequestError where it failed."""
    answers = await running.finished()
    for answer in answers:
        _raise_failure(answer)
    return reply.whole(answers)


class _Stream:
    """Writes events. aiohttp holds 64 KiB for a slow reader, then a write waits, and meanwhile
    what the answers gain collects in the answers."""

    def __init__(self, request: web.Request, reply: Reply, write_timeout_s: float) -> None:
        self._request = request
        self._reply = reply
        self._write_timeout_s = write_timeout_s
        self._response = web.StreamResponse(headers=sse.HEADERS)

    async def send(self, running: RunningCall) -> web.StreamResponse:
        try:
            await self._response.prepare(self._request)
            await self._send_events(running)
        except ConnectionResetError:
            logger.debug("request %s: its client left", self._request[REQUEST_ID])
        except TimeoutError:
            logger.info("request %s: its client does not read", self._request[REQUEST_ID])
            if self._request.transport is not None:
                self._request.transport.abort()
        return self._response

    async def _send_events(self, running: RunningCall) -> None:
        reply = self._reply
        await self._write(sse.events(reply.opening(running.answers)))
        try:
            async for changed in running.changes():
                await self._write(self._progress(changed))
            end = sse.events(reply.closing(running.answers))
        except RequestError as error:
            end = sse.event(reply.error(error))
        await self._write(end + sse.DONE)
        await self._response.write_eof()

    def _progress(self, changed: list[Answer]) -> bytes:
        for answer in changed:
            _raise_failure(answer)
        return b"".join(sse.events(self._reply.progress(answer)) for answer in changed)

    async def _write(self, data: bytes) -> None:
        if data:
            async with asyncio.timeout(self._write_timeout_s):
                await self._response.write(data)


def _raise_failure(answer: Answer) -> None:
    if (failure := answer.failure) is not None:
        raise failure
