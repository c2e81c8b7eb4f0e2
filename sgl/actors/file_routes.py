"""The routes of files and batches: one table, and a short handler for each row."""

from __future__ import annotations

import asyncio
import logging
from functools import wraps
from urllib.parse import quote

from aiohttp import web

from sgl.actors.access import Level
from sgl.actors.batches import Batches
from sgl.actors.endpoint import Endpoint, Handler
from sgl.actors.file_store import FileStore
from sgl.actors.gate import Gate
from sgl.actors.http_body import read_body, receive_file
from sgl.actors.middlewares import json_response
from sgl.errors import EngineError
from sgl.protocol.batches import MAX_LISTED_BATCHES, parse_batch
from sgl.protocol.files import MAX_LISTED_FILES, deleted_file, page, parse_page_query

logger = logging.getLogger(__name__)

MAX_BATCH_BODY_BYTES = 2**17
NUM_LISTED_BATCHES = 20  # unless the client says how many


class FileRoutes:
    """The handlers, and which is where and for whom. All clients see the same files."""

    def __init__(self, files: FileStore, batches: Batches, gate: Gate) -> None:
        self._files = files
        self._batches = batches
        self._gate = gate

    def table(self) -> list[Endpoint]:
        rows = [
            ("POST", "/v1/files", self.upload, "Store a file"),
            ("GET", "/v1/files", self.list_files, "All files, page by page"),
            ("GET", "/v1/files/{id}", self.one_file, "What is known of a file"),
            ("DELETE", "/v1/files/{id}", self.delete_file, "Delete a file"),
            ("GET", "/v1/files/{id}/content", self.content, "The bytes of a file"),
            ("POST", "/v1/batches", self.create_batch, "Answer all lines of a file"),
            ("GET", "/v1/batches", self.list_batches, "All batches, page by page"),
            ("GET", "/v1/batches/{id}", self.one_batch, "How far a batch is"),
            ("POST", "/v1/batches/{id}/cancel", self.cancel_batch, "End a batch early"),
        ]
        return [
            Endpoint(method, path, Level.API, _tells_of_disk(handler), summary)
            for method, path, handler, summary in rows
        ]

    async def upload(self, request: web.Request) -> web.StreamResponse:
        record = await receive_file(request, self._files)
        return json_response(record.show())

    async def list_files(self, request: web.Request) -> web.StreamResponse:
        query = parse_page_query(request.query, default=MAX_LISTED_FILES, most=MAX_LISTED_FILES)
        purpose = request.query.get("purpose")
        records = await asyncio.to_thread(self._files.all)
        if purpose is not None:
            records = [record for record in records if record.purpose == purpose]
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
        query = parse_page_query(request.query, default=NUM_LISTED_BATCHES, most=MAX_LISTED_BATCHES)
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
