"""The lines of a batch, each answered as the handler of its endpoint would answer it.

input ── parse, in a thread ──▶ lines in flight ── the engine ──▶ told, in the order of coming
         one at a time          as many as the share allows
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from sgl.actors.batch_files import input_lines
from sgl.actors.batch_share import BatchShare
from sgl.actors.front import Front
from sgl.actors.http_answer import whole_answer
from sgl.actors.openai_calls import CallParser
from sgl.errors import (
    EngineError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    RequestTooLargeError,
)
from sgl.protocol.batch_lines import MAX_LINES, Line, LineAnswer, LineParser, bad_line
from sgl.protocol.call import GenerationCall, WholeReply

logger = logging.getLogger(__name__)

RETRY_S = 0.5  # until a server that is full is asked again


class BatchLines:
    """The lines in the file at `path`; those over `max_bytes` are refused, as bodies are."""

    def __init__(
        self,
        path: Path,
        endpoint: str,
        parse: CallParser,
        front: Front,
        share: BatchShare,
        max_bytes: int,
    ) -> None:
        self._path = path
        self._endpoint = endpoint
        self._parse = parse
        self._front = front
        self._share = share
        self._max_bytes = max_bytes

    async def count(self) -> int:
        """Raises InvalidRequestError if these are no or too many lines."""
        num_lines = await asyncio.to_thread(sum, (1 for _ in self._texts()))
        if num_lines == 0:
            raise InvalidRequestError("the input file has no lines", param="input_file_id")
        if num_lines > MAX_LINES:
            raise InvalidRequestError(
                f"the input file has {num_lines} lines, a batch may have {MAX_LINES}: make several",
                param="input_file_id",
            )
        return num_lines

    async def answer(self, answered: Collection[int], tell: Callable[[LineAnswer], None]) -> None:
        """All but those with the numbers `answered`. Cancelling this aborts what is in flight."""
        in_flight: set[asyncio.Task[None]] = set()
        todo = self._without(answered)
        try:
            while (line := await asyncio.to_thread(next, todo, None)) is not None:
                try:
                    call, reply = await asyncio.to_thread(self._parse_line, line)
                    num_answers = len(call.prompts) * call.n
                    await self._share.take(num_answers)
                except RequestError as error:
                    tell(LineAnswer.of_error(line, error))
                    continue
                task = asyncio.create_task(self._answer_one(line, call, reply, tell))
                in_flight.add(task)
                task.add_done_callback(in_flight.discard)
                task.add_done_callback(partial(self._give_back, num_answers))
            await asyncio.gather(*in_flight)
        finally:
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)

    def _give_back(self, num_answers: int, done: asyncio.Task[None]) -> None:
        self._share.give(num_answers)

    def _texts(self) -> Iterator[tuple[int, bytes | None]]:
        return input_lines(self._path, self._max_bytes)

    def _without(self, answered: Collection[int]) -> Iterator[Line]:
        """Parses the others too: their custom_id cannot be used again."""
        parser = LineParser(self._endpoint)
        for number, text in self._texts():
            if text is None:
                error = RequestTooLargeError(
                    f"more than {self._max_bytes} bytes, see --max-body-mb"
                )
                line = bad_line(number, None, error)
            else:
                line = parser.parse(number, text)
            if number not in answered:
                yield line

    def _parse_line(self, line: Line) -> tuple[GenerationCall, WholeReply]:
        if line.error is not None:
            raise line.error
        call, reply = self._parse(line.body)
        if call.stream:
            raise InvalidRequestError("a line of a batch cannot have stream: true", param="stream")
        return call, reply

    async def _answer_one(
        self,
        line: Line,
        call: GenerationCall,
        reply: WholeReply,
        tell: Callable[[LineAnswer], None],
    ) -> None:
        try:
            answer = LineAnswer(line, 200, await self._generate(call, reply))
        except RequestError as error:
            if self._front.is_dead:
                await asyncio.Event().wait()  # the server ends; the next one answers this line
            answer = LineAnswer.of_error(line, error)
        except Exception:  # as around every request: this line fails, the others go on
            logger.exception("line %d failed", line.number)
            answer = LineAnswer.of_error(line, EngineError("internal error; the log has more"))
        tell(answer)

    async def _generate(self, call: GenerationCall, reply: WholeReply) -> object:
        while True:
            try:
                async with await self._front.submit(call) as running:
                    return await whole_answer(running, reply)
            except OverloadedError:  # others fill the server
                await asyncio.sleep(RETRY_S)
