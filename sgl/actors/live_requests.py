"""Which answers are in the making: their names, and how many there may be.

take ──────▶ start ─────────────────▶ forget
 a name and room are taken   the engine works on it   both are free again
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from sgl.actors.running_call import RunningCall
from sgl.actors.session_tree import Node
from sgl.errors import InvalidRequestError, OverloadedError
from sgl.protocol.call import Answer, GenerationCall, PromptCall


@dataclass(slots=True)
class LiveRequest:
    """A request the engine works on.

    rid     name of its prompt; the samples of a prompt share it
    node    its place in a session, if it has one
    latest  when its last tokens came
    """

    call: RunningCall
    answer: Answer
    prompt: PromptCall
    rid: str
    started: float
    is_stream: bool
    node: Node | None = None
    latest: float | None = None


class LiveRequests:
    """request id -> who waits for it; `max_per_call` answers of a call, `max_live` in all."""

    def __init__(self, max_live: int, max_per_call: int) -> None:
        self._max_live = max_live
        self._max_per_call = max_per_call
        self._live: dict[int, LiveRequest] = {}
        self._by_rid: dict[str, set[int]] = {}
        self._num_taken = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        """Answers in the making, those included whose prompt is still being checked."""
        return self._num_taken

    def __iter__(self) -> Iterator[tuple[int, LiveRequest]]:
        return iter(list(self._live.items()))

    def get(self, request_id: int) -> LiveRequest | None:
        return self._live.get(request_id)

    def named(self, rid: str) -> list[int]:
        return sorted(self._by_rid.get(rid, ()))

    def take(self, call: GenerationCall, undo: ExitStack) -> list[str]:
        """Room for the call's answers and a rid for each prompt; `undo` gives them back."""
        num_answers = len(call.prompts) * call.n
        self._check_room(call, num_answers)
        self._count(num_answers)
        undo.callback(self._count, -num_answers)
        rids = [prompt.rid or uuid.uuid4().hex for prompt in call.prompts]
        for rid in rids:
            if rid in self._by_rid:
                raise InvalidRequestError(f"rid {rid!r} is in use already", param="rid")
            self._by_rid[rid] = set()
            undo.callback(self._by_rid.pop, rid)
        return rids

    def start(self, request_id: int, live: LiveRequest) -> None:
        self._live[request_id] = live
        self._by_rid[live.rid].add(request_id)

    def forget(self, request_id: int) -> None:
        live = self._live.pop(request_id)
        samples = self._by_rid[live.rid]
        samples.remove(request_id)
        if not samples:
            del self._by_rid[live.rid]
        self._count(-1)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until there are none; False if some still are."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        return self._idle.is_set()

    def _check_room(self, call: GenerationCall, num_answers: int) -> None:
        if num_answers > self._max_per_call:
            raise InvalidRequestError(
                f"the request asks for {num_answers} answers ({len(call.prompts)} prompts, n = "
                f"{call.n}), a request may ask for {self._max_per_call}",
                param="n",
            )
        if num_answers > self._max_live:
            raise InvalidRequestError(
                f"the request asks for {num_answers} answers, the server takes {self._max_live} at "
                "a time: send several requests, or start the server with a larger "
                "--max-queue-requests",
                param="n",
            )
        if self._num_taken + num_answers > self._max_live:
            raise OverloadedError(
                f"{self._num_taken} requests are waiting or running, the server takes "
                f"{self._max_live}: try again later"
            )

    def _count(self, change: int) -> None:
        self._num_taken += change
        if self._num_taken:
            self._idle.clear()
        else:
            self._idle.set()
