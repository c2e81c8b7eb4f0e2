"""The body of a request: read as a whole, or in pieces onto the disk; never for ever."""

from __future__ import annotations

import asyncio

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError

from sgl.actors.file_store import FileStore, Upload, file_too_large
from sgl.errors import InvalidRequestError, RequestTooLargeError
from sgl.protocol.files import FileRecord, check_filename, check_purpose

BODY_TIMEOUT_S = 60.0  # for a whole body; for each piece of an upload
PIECE_BYTES = 2**18
MAX_PARTS = 8
MAX_FIELD_BYTES = 256
ENVELOPE_BYTES = 2**16  # of an upload, around the file itself


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """The whole body; refused early if it is too large, given up if it does not come."""
    if request.content_length is not None and request.content_length > max_bytes:
        raise RequestTooLargeError(
            f"the body has {request.content_length} bytes, the server reads {max_bytes}: send "
            "less, or start the server with a larger --max-body-mb"
        )
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    except (RequestPayloadError, HttpProcessingError) as error:
        coding = request.headers.get("Content-Encoding", "none")
        raise InvalidRequestError(
            f"the body cannot be decoded (Content-Encoding: {coding:.40})"
        ) from error


async def receive_file(request: web.Request, store: FileStore) -> FileRecord:
    """Store the file of a form with the fields file and purpose; raises RequestError."""
    if request.content_type != "multipart/form-data":
        raise InvalidRequestError(
            f"a file is sent as multipart/form-data, not {request.content_type!r:.80}: with curl, "
            "-F purpose=batch -F file=@lines.jsonl"
        )
    length = request.content_length
    if length is not None and length > store.max_bytes + ENVELOPE_BYTES:
        raise file_too_large(store.max_bytes)
    upload = await asyncio.to_thread(store.begin)
    try:
        filename, purpose = await _read_form(await request.multipart(), upload)
        return await asyncio.to_thread(upload.commit, filename, purpose)
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    except (ValueError, RuntimeError, HttpProcessingError) as error:  # of aiohttp's parser
        reason = " ".join(str(error).split())  # aiohttp's has several lines
        raise InvalidRequestError(f"the form cannot be read: {reason:.200}") from None
    finally:
        await asyncio.to_thread(upload.discard)


async def _read_form(form: MultipartReader, upload: Upload) -> tuple[str, str]:
    """The names of file and purpose; the file goes to `upload`."""
    filename, purpose = None, "batch"
    for _ in range(MAX_PARTS):
        async with asyncio.timeout(BODY_TIMEOUT_S):
            part = await form.next()
        if part is None:
            break
        if not isinstance(part, BodyPartReader):
            raise InvalidRequestError("a form inside the form: send file and purpose only")
        match part.name or "":
            case "file" if filename is not None:
                raise InvalidRequestError("the form has two files: send one at a time")
            case "file":
                filename = check_filename(part.filename or "upload")
                await _copy(part, upload)
            case "purpose":
                purpose = check_purpose(await _read_field(part))
            case name if name.startswith("expires_after"):
                raise InvalidRequestError(
                    "expires_after is not supported: files are kept until they are deleted",
                    param="expires_after",
                )
    else:
        raise InvalidRequestError(f"the form has more than {MAX_PARTS - 1} fields")
    if filename is None:
        raise InvalidRequestError("the form has no field named file", param="file")
    return filename, purpose


async def _copy(part: BodyPartReader, upload: Upload) -> None:
    while not part.at_eof():
        async with asyncio.timeout(BODY_TIMEOUT_S):
            piece = await part.read_chunk(PIECE_BYTES)
        await asyncio.to_thread(upload.write, piece)


async def _read_field(part: BodyPartReader) -> str:
    async with asyncio.timeout(BODY_TIMEOUT_S):
        text = await part.read_chunk(PIECE_BYTES)
    if len(text) > MAX_FIELD_BYTES or not part.at_eof():
        raise InvalidRequestError(
            f"{part.name} must have at most {MAX_FIELD_BYTES} bytes", param=part.name
        )
    return text.decode()
