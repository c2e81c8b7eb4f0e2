"""The routes of files and batches: one table, and a short handler for each row."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from functools import wraps
from urllib.parse import quote

from aiohttp import web

from sgl.actors.access import Level
from sgl.actors.batches import Batches
from sgl.actors.endpoint import NOT_READY, REFUSED, Endpoint, Handler
from sgl.actors.file_store import FileStore
from sgl.actors.gate import Gate
from sgl.actors.http_body import read_body, receive_file
from sgl.actors.middlewares import json_response
from sgl.errors import EngineError
from sgl.protocol.batches import BatchBody, BatchQuery, parse_batch
from sgl.protocol.file_answers import BatchList, BatchObject, DeletedFile, FileList, FileObject
from sgl.protocol.files import FileQuery, UploadForm, deleted_file, page, parse_query

logger = logging.getLogger(__name__)

MAX_BATCH_BODY_BYTES = 2**17


class FileRoutes:
    """The handlers, and which is where and for whom. All clients see the same files."""

    def __init__(self, files: FileStore, batches: Batches, gate: Gate) -> None:
        self._files = files
        self._batches = batches
        self._gate = gate

    def table(self) -> list[Endpoint]:
        rows = [
            Endpoint(
                "POST",
                "/v1/files",
                Level.API,
                self.upload,
                "Store a file",
                form=UploadForm,
                answer=FileObject,
            ),
            Endpoint(
                "GET",
                "/v1/files",
                Level.API,
                self.list_files,
                "All files, page by page",
                query=FileQuery,
                answer=FileList,
            ),
            Endpoint(
                "GET",
                "/v1/files/{id}",
                Level.API,
                self.one_file,
                "What is known of a file",
                answer=FileObject,
            ),
            Endpoint(
                "DELETE",
                "/v1/files/{id}",
                Level.API,
                self.delete_file,
                "Delete a file",
                answer=DeletedFile,
                errors=REFUSED,
            ),
            Endpoint(
                "GET",
                "/v1/files/{id}/content",
                Level.API,
                self.content,
                "The bytes of a file",
                answer="application/octet-stream",
            ),
            Endpoint(
                "POST",
                "/v1/batches",
                Level.API,
                self.create_batch,
                "Answer all lines of a file",
                body=BatchBody,
                answer=BatchObject,
                errors=NOT_READY,
            ),
            Endpoint(
                "GET",
                "/v1/batches",
                Level.API,
                self.list_batches,
                "All batches, page by page",
                query=BatchQuery,
                answer=BatchList,
            ),
            Endpoint(
                "GET",
                "/v1/batches/{id}",
                Level.API,
                self.one_batch,
                "How far a batch is",
                answer=BatchObject,
            ),
            Endpoint(
                "POST",
                "/v1/batches/{id}/cancel",
                Level.API,
                self.cancel_batch,
                "End a batch early",
                answer=BatchObject,
                errors=REFUSED,
            ),
        ]
        return [
            replace(row, handler=_tells_of_disk(row.handler), errors=(*row.errors, 500))
            for row in rows
        ]

    async def upload(self, request: web.Request) -> web.StreamResponse:
        record = await receive_file(request, self._files)
        return json_response(record.show())

    async def list_files(self, request: web.Request) -> web.StreamResponse:
        query = parse_query(request.query, FileQuery)
        records = await asyncio.to_thread(self._files.all)
        if query.purpose is not None:
            records = [record for record in records if record.purpose == query.purpose]
        return json_response(page(records, query))

    async def one_file(self, request: web.Request) -> web.StreamResponse:
        record = await asyncio.to_thread(self._files.get, request.match_info["id"])
        return json_response(record.show())

    async def delete_file(self, request: web.Request) -> web.StreamResponse:
        file_id = request.match_info["id"]
        await self._batches.check_unused(file_id)
        await asyncio.to_thread(self._files.delete, file_id)
        return json_response(deleted_file(file_id))

    async def content(self, request: web.Request) -> web.StreamResponse:
        record = await asyncio.to_thread(self._files.get, request.match_info["id"])
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(record.filename)}",
            "X-Content-Type-Options": "nosniff",  # whatever it is, no browser shows it as a page
        }
        return web.FileResponse(self._files.data_path(record.id), headers=headers)

    async def create_batch(self, request: web.Request) -> web.StreamResponse:
        self._gate.check()
        wanted = parse_batch(await read_body(request, MAX_BATCH_BODY_BYTES))
        record = await self._batches.create(wanted)
        return json_response(record.show())

    async def list_batches(self, request: web.Request) -> web.StreamResponse:
        query = parse_query(request.query, BatchQuery)
        return json_response(page(await self._batches.all(), query))

    async def one_batch(self, request: web.Request) -> web.StreamResponse:
        record = await self._batches.get(request.match_info["id"])
        return json_response(record.show())

    async def cancel_batch(self, request: web.Request) -> web.StreamResponse:
        record = await self._batches.cancel(request.match_info["id"])
        return json_response(record.show())


def _tells_of_disk(handler: Handler) -> Handler:
    """A full or broken disk as an error that says so; paths stay in the log."""

    @wraps(handler)
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except (ConnectionError, TimeoutError):  # of the client
            raise
        except OSError as error:
            logger.error("%s %.200r: %s", request.method, request.path, error)
            raise EngineError(
                "the folder of --file-storage-path cannot be used: "
                f"{error.strerror or 'the log has more'}"
            ) from None

    return handle
