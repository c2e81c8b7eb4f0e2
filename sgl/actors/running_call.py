"""A call that is being answered: what its client waits on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType

from sgl.errors import RequestError
from sgl.messages import TextDelta
from sgl.protocol.call import Answer


class RunningCall:
    """Answers that grow; used as `async with`, so that leaving early aborts the rest.

    A client that reads slowly finds everything it missed in one change: nothing is queued but the
    answers themselves.
    """

    def __init__(self, answers: Sequence[Answer], abandon: Callable[[RunningCall], None]) -> None:
        self.answers = answers
        self._abandon = abandon
        self._num_open = len(answers)
        self._changed: dict[int, Answer] = {}
        self._error: RequestError | None = None
        self._wake = asyncio.Event()

    async def __aenter__(self) -> RunningCall:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_finished(self) -> bool:
        return self._num_open == 0

    async def changes(self) -> AsyncIterator[list[Answer]]:
        """The answers that gained something, each time some did; ends with the last of them.

        Raises EngineError when the engine dies.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._changed:
                changed, self._changed = list(self._changed.values()), {}
                yield changed
            elif self.is_finished:
                return
            else:
                await self._wake.wait()
                self._wake.clear()

    async def begun(self) -> None:
        """Until an answer has gained something, or none ever will."""
        while not (self._changed or self.is_finished):
            await self._wake.wait()
            self._wake.clear()

    async def finished(self) -> Sequence[Answer]:
        """All answers, whole."""
        async for _ in self.changes():
            pass
        return self.answers

    def close(self) -> None:
        """Abort what is not finished; does nothing the second time."""
        if not self.is_finished:
            self._abandon(self)

    def add(self, answer: Answer, delta: TextDelta) -> None:
        """The front: one of the answers has gained something."""
        answer.add(delta)
        self._changed[answer.index] = answer
        self._num_open -= delta.finish is not None
        self._wake.set()

    def fail(self, error: RequestError) -> None:
        """The front: there will be no more."""
        self._error = error
        self._num_open = 0
        self._wake.set()
