"""When requests leave, and the run itself.

Open loop: a request leaves at its time, however many are still unanswered. With a limit on
concurrency it leaves when its time has come and a place is free; its clock starts only then.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from sgl.bench.prompts import Content, Conversation, Format, Message, Turn
from sgl.bench.servers import Answer
from sgl.errors import RequestError

Ask: TypeAlias = Callable[[Content, Turn], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt as it was sent, and what came back."""

    content: Content
    answer: Answer


@dataclass(frozen=True, slots=True)
class Run:
    """All exchanges, in the order in which they ended; `client_share` of a core was our own."""

    exchanges: Sequence[Exchange]
    client_share: float


def arrivals(num: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each of `num` conversations begins; the first at 0.

    Gaps follow a gamma distribution with mean 1 / rate and the shape `burstiness`; the shape 1 is
    the exponential distribution, which makes a Poisson process.
    """
    if math.isinf(rate):
        return [0.0] * num
    random = Random(f"arrivals {seed}")
    times = [0.0]
    while len(times) < num:
        times.append(times[-1] + random.gammavariate(burstiness, 1 / (rate * burstiness)))
    return times[:num]


class LoadGenerator:
    """Sends conversations, at most `max_concurrency` requests at a time."""

    def __init__(
        self,
        ask: Ask,
        to_content: Format,
        max_concurrency: int | None = None,
        on_end: Callable[[int], object] = lambda num_turns: None,
    ) -> None:
        self._ask = ask
        self._to_content = to_content
        self._places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        self._on_end = on_end
        self._exchanges: list[Exchange] = []

    async def run(self, conversations: Sequence[Conversation], starts: Sequence[float]) -> Run:
        """Send everything; returns when the last answer is there."""
        begin, begin_cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as tasks:
            for conversation, start in zip(conversations, starts, strict=True):
                if (delay := begin + start - time.perf_counter()) > 0:
                    await asyncio.sleep(delay)
                tasks.create_task(self._hold(conversation))
        used = time.process_time() - begin_cpu
        return Run(self._exchanges, used / (time.perf_counter() - begin))

    async def _hold(self, conversation: Conversation) -> None:
        """One conversation; a failure ends it."""
        messages: list[Message] = []
        for number, turn in enumerate(conversation):
            exchange = await self._exchange(turn, messages)
            self._exchanges.append(exchange)
            if exchange.answer.error:
                self._on_end(len(conversation) - number)
                return
            self._on_end(1)
            messages.append({"role": "assistant", "content": exchange.answer.text})

    async def _exchange(self, turn: Turn, messages: list[Message]) -> Exchange:
        async with AsyncExitStack() as stack:
            if self._places is not None:
                await stack.enter_async_context(self._places)
            content: Content = turn.content
            if isinstance(content, str):
                messages.append({"role": "user", "content": content})
                try:
                    content = self._to_content(messages)
                except RequestError as error:  # the template does not accept the messages
                    now = time.perf_counter()
                    return Exchange(content, Answer(sent_s=now, end_s=now, error=str(error)))
            return Exchange(content, await self._ask(content, turn))
