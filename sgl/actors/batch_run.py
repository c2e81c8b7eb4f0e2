"""One batch, from its first line to its files; cut off anywhere, it goes on from what is on disk.

validating ──▶ in_progress ──▶ finalizing ──▶ completed
    │  └────────────┴── cancel ──▶ cancelling ──▶ cancelled
    └▶ failed       └── 24 hours ──▶ expired
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

import msgspec

from sgl.actors.batch_files import AnswerFile, BatchFiles
from sgl.actors.batch_lines import BatchLines
from sgl.actors.file_store import FileStore, new_file_id
from sgl.actors.records import RecordFolder
from sgl.errors import InvalidRequestError
from sgl.protocol.batch_lines import LineAnswer
from sgl.protocol.batches import BatchError, BatchRecord
from sgl.protocol.files import BATCH_OUTPUT

logger = logging.getLogger(__name__)


class BatchRun:
    """A batch that has not ended, in the server that holds its lock.

    turns   how many batches have lines in flight at a time
    """

    def __init__(
        self,
        record: BatchRecord,
        lines: BatchLines,
        answers: BatchFiles,
        *,
        files: FileStore,
        records: RecordFolder[BatchRecord],
        turns: asyncio.Semaphore,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.record = record
        self._lines = lines
        self._answers = answers
        self._files = files
        self._records = records
        self._turns = turns
        self._clock = clock
        self._disk = asyncio.Lock()
        self._is_stopped = False
        self._unwritten: asyncio.Queue[LineAnswer | None] = asyncio.Queue()
        self._work: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the batch has ended or is stopped."""
        try:
            if not self.record.is_closing and not self._is_stopped:
                await self._answer_in_time()
            if self._is_stopped:
                await self.save()
            else:
                await self._finalize()
        except (OSError, InvalidRequestError) as error:
            await self._fail(error)
        finally:
            await asyncio.to_thread(self._answers.close)

    def cancel(self) -> None:
        """Stop what is in flight, keep what is answered; raises InvalidRequestError if too late."""
        if self.record.status != "cancelling":
            check_cancellable(self.record)
            self.record.enter("cancelling", self._clock())
            self._end_work()

    def stop(self) -> None:
        """The server ends: leave the rest for the next start."""
        self._is_stopped = True
        self._end_work()

    async def save(self) -> None:
        encoded = msgspec.json.encode(self.record)
        await self._on_disk(partial(self._records.write_encoded, self.record.id, encoded))

    async def _on_disk(self, work: Callable[[], None]) -> None:
        """In turn, and to its end even if the caller is cancelled: the next finds nothing half
        done."""

        async def in_turn() -> None:
            async with self._disk:
                await asyncio.to_thread(work)

        await asyncio.shield(in_turn())

    def _end_work(self) -> None:
        if self._work is not None:
            self._work.cancel()

    async def _answer_in_time(self) -> None:
        """Answer lines until all are answered, the time is up or somebody ends the work."""
        self._work = asyncio.create_task(self._answer_all())
        writer = asyncio.create_task(self._write_answers())
        seconds_left = max(0.0, self.record.expires - self._clock())
        await asyncio.wait(
            (self._work, writer), timeout=seconds_left, return_when=asyncio.FIRST_COMPLETED
        )
        self._work.cancel()
        await asyncio.wait((self._work,))
        self._unwritten.put_nowait(None)
        await writer
        if not self._work.cancelled():
            self._work.result()

    async def _answer_all(self) -> None:
        async with self._turns:
            self.record.num_lines = await self._lines.count()
            await self._on_disk(self._answers.open)
            self._count()
            if self.record.status == "validating":
                self.record.enter("in_progress", self._clock())
            await self.save()
            answered = self._answers.output.numbers | self._answers.errors.numbers
            await self._lines.answer(answered, self._unwritten.put_nowait)

    async def _write_answers(self) -> None:
        """Append what is answered, several lines at once where they come fast, until None comes."""
        is_last = False
        while not is_last:
            waiting = [await self._unwritten.get()]
            while not self._unwritten.empty():
                waiting.append(self._unwritten.get_nowait())
            answers = [answer for answer in waiting if answer is not None]
            is_last = len(answers) < len(waiting)
            await asyncio.to_thread(self._answers.append, answers)
            self._count()

    def _count(self) -> None:
        self.record.num_completed = len(self._answers.output.numbers)
        self.record.num_failed = len(self._answers.errors.numbers)

    async def _finalize(self) -> None:
        """Turn the answers into files. After a crash inside, this is done once more."""
        record = self.record
        if record.output_file_id is None and record.error_file_id is None:
            await self._on_disk(self._answers.open)
            self._count()
            self._enter_finalizing()
            await self.save()
        await asyncio.to_thread(self._adopt_answers)
        self._enter_end()
        await self.save()
        await asyncio.to_thread(self._answers.remove)
        logger.info(
            "%s is %s: %d answers and %d errors for %d lines",
            record.id,
            record.status,
            record.num_completed,
            record.num_failed,
            record.num_lines,
        )

    def _enter_finalizing(self) -> None:
        record = self.record
        if record.is_answered and not record.is_closing:
            record.enter("finalizing", self._clock())
        if record.num_completed:
            record.output_file_id = new_file_id()
        if record.num_failed:
            record.error_file_id = new_file_id()

    def _enter_end(self) -> None:
        if self.record.status == "cancelling":
            self.record.enter("cancelled", self._clock())
        else:
            self.record.enter("completed" if self.record.is_answered else "expired", self._clock())

    def _adopt_answers(self) -> None:
        self._adopt(self._answers.output, self.record.output_file_id, "output")
        self._adopt(self._answers.errors, self.record.error_file_id, "errors")

    def _adopt(self, file: AnswerFile, file_id: str | None, kind: str) -> None:
        file.close()
        if file_id is not None:
            filename = f"{self.record.id}_{kind}.jsonl"
            self._files.adopt(file.path, file_id, filename, BATCH_OUTPUT)

    async def _fail(self, error: OSError | InvalidRequestError) -> None:
        """The input has no lines that can be read, or the disk does not do its work."""
        logger.warning("%s failed: %s", self.record.id, error)
        self.record.errors.append(_as_batch_error(error))
        self.record.enter("failed", self._clock())
        try:
            await self.save()
            await asyncio.to_thread(self._answers.remove)
        except OSError:
            logger.exception("the state of %s cannot be kept", self.record.id)


def check_cancellable(record: BatchRecord) -> None:
    """Raises InvalidRequestError if it is too late."""
    if record.status not in ("validating", "in_progress"):
        raise InvalidRequestError(
            f"{record.id} is {record.status}: only a batch that is validating or in progress can "
            "be cancelled"
        )


def _as_batch_error(error: OSError | InvalidRequestError) -> BatchError:
    match error:
        case FileNotFoundError():
            return BatchError(code="file_not_found", message="the input file is not there any more")
        case OSError():
            reason = error.strerror or "the disk does not work"
            return BatchError(code="storage_error", message=f"files cannot be kept: {reason}")
        case InvalidRequestError():
            return BatchError(code="invalid_input", message=str(error), param=error.param)
