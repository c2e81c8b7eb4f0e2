"""How much of the server batches may use: they leave room for whoever waits for an answer."""

from __future__ import annotations

import asyncio

from sgl.errors import InvalidRequestError

MAX_ANSWERS = 64


class BatchShare:
    """Answers that all batches together may have in the making, first come, first served.

    usual_most   so many at a time
    most         one request that wants more gets it alone, up to so many
    """

    def __init__(self, usual_most: int, most: int) -> None:
        self._usual_most = max(1, usual_most)
        self._most = max(most, self._usual_most)
        self._num_taken = 0
        self._is_closed = False
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    @classmethod
    def of(cls, *, max_running: int, max_live: int) -> BatchShare:
        """Half of what runs at a time, so that others start at once, and never half the queue."""
        return cls(min(MAX_ANSWERS, max_running // 2), max_live // 2)

    async def take(self, num_answers: int) -> None:
        """Wait for room; raises InvalidRequestError if there can never be enough."""
        if num_answers > self._most:
            raise InvalidRequestError(
                f"the request asks for {num_answers} answers (prompts times n), one of a batch may "
                f"ask for {self._most} on this server",
                param="n",
            )
        async with self._turn:
            while not self._has_room(num_answers):
                self._changed.clear()
                await self._changed.wait()
            self._num_taken += num_answers

    def give(self, num_answers: int) -> None:
        self._num_taken -= num_answers
        self._changed.set()

    def close(self) -> None:
        """From now on whoever takes waits for ever: the server is about to end."""
        self._is_closed = True

    def _has_room(self, num_answers: int) -> bool:
        if self._is_closed:
            return False
        return not self._num_taken or self._num_taken + num_answers <= self._usual_most
