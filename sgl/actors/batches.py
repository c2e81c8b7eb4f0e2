"""All batches of a server: those that run, and on disk those that have ended.

A batch belongs to the server that holds its lock, so several servers may share a folder. When one
starts, it goes on with the batches that nobody holds and that were made for its model.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

import msgspec

from sgl.actors.batch_files import BatchFiles
from sgl.actors.batch_lines import BatchLines
from sgl.actors.batch_run import BatchRun, check_cancellable
from sgl.actors.batch_share import BatchShare
from sgl.actors.file_store import FileStore
from sgl.actors.front import Front
from sgl.actors.openai_calls import OpenAiCalls
from sgl.actors.records import RecordFolder
from sgl.errors import InvalidRequestError, NotFoundError, OverloadedError
from sgl.protocol.batches import BatchBody, BatchRecord, check_batch_id, no_batch

logger = logging.getLogger(__name__)

MAX_OPEN = 100
MAX_ANSWERING = 8


class Batches:
    """What the routes ask for; raises RequestError where that cannot be."""

    def __init__(
        self,
        files: FileStore,
        front: Front,
        calls: OpenAiCalls,
        share: BatchShare,
        max_line_bytes: int,
    ) -> None:
        self._files = files
        self._front = front
        self._calls = calls
        self._share = share
        self._max_line_bytes = max_line_bytes
        self._records = RecordFolder(files.folder, "batch_", BatchRecord)
        self._turns = asyncio.Semaphore(MAX_ANSWERING)
        self._runs: dict[str, BatchRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def resume(self) -> None:
        """Go on with what was cut off when a server stopped; tidy the folder up."""
        try:
            left = await asyncio.to_thread(self._take_over)
        except OSError as error:
            logger.error("The batches of earlier runs cannot be read: %s", error)
            return
        for record, answers in left:
            logger.info("Going on with %s, which is %s", record.id, record.status)
            self._start(record, answers)

    async def create(self, wanted: BatchBody) -> BatchRecord:
        if len(self._runs) >= MAX_OPEN:
            raise OverloadedError(
                f"{MAX_OPEN} batches are waiting or running: try again when one of them has ended"
            )
        record = BatchRecord(
            id=f"batch_{uuid.uuid4().hex}",
            input_file_id=wanted.input_file_id,
            endpoint=wanted.endpoint,
            model=self._calls.model_name,
            created=time.time(),
            metadata=wanted.metadata,
        )
        self._start(record, await asyncio.to_thread(self._keep, record))
        return record

    async def get(self, batch_id: str) -> BatchRecord:
        run = self._runs.get(batch_id)
        return await asyncio.to_thread(self._read, batch_id) if run is None else run.record

    async def all(self) -> list[BatchRecord]:
        kept = await asyncio.to_thread(lambda: list(self._records.all()))
        runs = self._runs
        return [runs[record.id].record if record.id in runs else record for record in kept]

    async def cancel(self, batch_id: str) -> BatchRecord:
        """Stops what is in flight; answers that are there become files."""
        run = self._runs.get(batch_id)
        if run is None:
            run = self._start(*await asyncio.to_thread(self._take_to_cancel, batch_id))
        run.cancel()
        told = msgspec.structs.replace(run.record)  # before it is cancelled, which is soon
        await run.save()
        return told

    async def check_unused(self, file_id: str) -> None:
        """Raises InvalidRequestError if a batch, of any server, still has to read the file."""
        for record in await self.all():
            if record.input_file_id == file_id and not record.has_ended:
                raise InvalidRequestError(
                    f"{record.id} still reads this file: cancel the batch first"
                )

    def pause(self) -> None:
        """Start no more lines."""
        self._share.close()

    async def stop(self) -> None:
        """End what is in flight; the next start goes on."""
        for run in self._runs.values():
            run.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, record: BatchRecord, answers: BatchFiles) -> BatchRun:
        lines = BatchLines(
            self._files.data_path(record.input_file_id),
            record.endpoint,
            self._calls.by_path[record.endpoint],
            self._front,
            self._share,
            self._max_line_bytes,
        )
        run = BatchRun(
            record, lines, answers, files=self._files, records=self._records, turns=self._turns
        )
        self._runs[record.id] = run
        task = asyncio.create_task(self._run(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    async def _run(self, run: BatchRun) -> None:
        try:
            await run.run()
        except Exception:  # the outermost: the server and the other batches go on
            logger.exception("%s broke down; the next start goes on with it", run.record.id)
        finally:
            del self._runs[run.record.id]

    def _keep(self, record: BatchRecord) -> BatchFiles:
        """A new batch on disk; raises InvalidRequestError if there is nothing to read for it."""
        try:
            purpose = self._files.get(record.input_file_id).purpose
        except NotFoundError as error:
            raise InvalidRequestError(str(error), param="input_file_id") from None
        if purpose != "batch":
            raise InvalidRequestError(
                f"the input file was uploaded with the purpose {purpose}: upload it with the "
                "purpose batch",
                param="input_file_id",
            )
        answers = BatchFiles(self._files.folder, record.id)
        answers.lock()
        try:
            self._records.write(record)
        except OSError:
            answers.remove()
            raise
        return answers

    def _read(self, batch_id: str) -> BatchRecord:
        record = self._records.read(check_batch_id(batch_id))
        if record is None:
            raise no_batch(batch_id)
        return record

    def _take_over(self) -> list[tuple[BatchRecord, BatchFiles]]:
        """What this server should go on with, locked."""
        taken, kept_ids = list[tuple[BatchRecord, BatchFiles]](), set[str]()
        for record in self._records.all():
            if record.has_ended or record.id in self._runs:
                continue
            kept_ids |= {record.output_file_id or "", record.error_file_id or ""}
            if record.model != self._calls.model_name:
                logger.info("%s waits for a server of the model %s", record.id, record.model)
            elif (mine := self._lock(record.id)) is not None:
                taken.append(mine)
        self._files.sweep(kept_ids)
        return taken

    def _take_to_cancel(self, batch_id: str) -> tuple[BatchRecord, BatchFiles]:
        """A batch that is not of this server; raises InvalidRequestError if it has an owner."""
        check_cancellable(self._read(batch_id))
        mine = self._lock(batch_id)
        if mine is None:
            raise InvalidRequestError(
                f"{batch_id} is run by another server that has the same --file-storage-path: "
                "cancel it there"
            )
        return mine

    def _lock(self, batch_id: str) -> tuple[BatchRecord, BatchFiles] | None:
        """The batch as it is once nobody else can change it; None if it is not to be had."""
        answers = BatchFiles(self._files.folder, batch_id)
        if not answers.lock():
            return None
        record = self._records.read(batch_id)
        if record is None or record.has_ended:  # its owner was faster
            answers.remove()
            return None
        return record, answers
