"""What is asked of the engine, and whoever waits for the reply."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from sgl.errors import InvalidRequestError, RequestError
from sgl.messages import Question, Reply


class Questions:
    """call_id -> who waits; `send` takes the message that asks."""

    def __init__(self, send: Callable[[Question], None]) -> None:
        self._send = send
        self._call_ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Reply]] = {}

    async def ask(self, make: Callable[[int], Question]) -> Reply:
        """The reply to the message that `make` makes with the call_id it is given."""
        call_id = next(self._call_ids)
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[call_id] = reply
        self._send(make(call_id))
        try:
            return await reply
        finally:
            self._replies.pop(call_id, None)

    def answer(self, reply: Reply) -> None:
        """A reply came; nobody may wait for it any more."""
        waiting = self._replies.get(reply.call_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def fail(self, error: RequestError) -> None:
        """No reply will come."""
        for waiting in self._replies.values():
            if not waiting.done():
                waiting.set_exception(error)


def told(reply: Reply) -> str:
    """What the engine answered; raises InvalidRequestError where it refused."""
    if not reply.ok:
        raise InvalidRequestError(reply.text)
    return reply.text
