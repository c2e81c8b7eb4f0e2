"""`/v1/files`: what is known of a file, and how lists of files and batches are told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from msgspec import Meta

from sgl.errors import InvalidRequestError, NotFoundError
from sgl.protocol.body import check_name, convert, one_of
from sgl.protocol.file_answers import DeletedFile, FileObject

MAX_FILENAME_CHARS = 255
MAX_LISTED_FILES = 10_000
PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
BATCH_OUTPUT = "batch_output"
ORDERS = ("asc", "desc")

_FILE_ID = re.compile("file-[0-9a-f]{32}")


class UploadForm(msgspec.Struct, kw_only=True):
    """The fields of the form that uploads a file.

    file     its bytes, and its name
    purpose  what it is for: batch, to be the input of one
    """

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]
    purpose: Annotated[str, one_of(*PURPOSES)] = "batch"


class FileRecord(msgspec.Struct, kw_only=True, frozen=True):
    """What is kept of a file beside its bytes; `created` is in seconds since 1970."""

    id: str
    num_bytes: int
    created: float
    filename: str
    purpose: str

    def show(self) -> FileObject:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": int(self.created),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
            "expires_at": None,
        }


def check_file_id(file_id: str) -> str:
    """`file_id`, which becomes part of a path; raises NotFoundError if no file can be called so."""
    if _FILE_ID.fullmatch(file_id) is None:
        raise no_file(file_id)
    return file_id


def no_file(file_id: str) -> NotFoundError:
    return NotFoundError(f"there is no file {file_id!r:.80}: GET /v1/files lists all", param="id")


def check_filename(filename: str) -> str:
    """Shown to clients, never part of a path here."""
    return check_name(filename, "filename", MAX_FILENAME_CHARS)


def check_purpose(purpose: str) -> str:
    if purpose not in PURPOSES:
        raise InvalidRequestError(
            f"purpose must be one of {', '.join(PURPOSES)}, got {purpose!r:.40}", param="purpose"
        )
    return purpose


def deleted_file(file_id: str) -> DeletedFile:
    return {"id": file_id, "object": "file", "deleted": True}


class Record(Protocol):
    """A file or a batch."""

    @property
    def id(self) -> str: ...

    @property
    def created(self) -> float: ...

    def show(self) -> Mapping[str, object]: ...


Q = TypeVar("Q", bound="PageQuery")


class PageQuery(msgspec.Struct, kw_only=True, frozen=True):
    """Which part of a list a client wants.

    limit   how many
    after   only what comes after the one of this id
    order   by age: desc begins with the newest
    """

    limit: int
    after: str | None = None
    order: Annotated[str, one_of(*ORDERS)] = "desc"


class FileQuery(PageQuery, kw_only=True, frozen=True):
    """Which files.

    purpose   only files of it
    """

    limit: Annotated[int, Meta(ge=1, le=MAX_LISTED_FILES)] = MAX_LISTED_FILES
    purpose: str | None = None


def parse_query(query: Mapping[str, str], query_type: type[Q]) -> Q:
    """The parameters of a GET; raises InvalidRequestError."""
    wanted = convert({name: query[name] for name in query}, query_type, is_text=True)
    if wanted.order not in ORDERS:
        raise InvalidRequestError(
            f"order must be asc or desc, got {wanted.order!r:.40}", param="order"
        )
    return wanted


def page(records: Sequence[Record], query: PageQuery) -> dict[str, Any]:
    """The records of one page as a list object; raises InvalidRequestError."""
    ordered = sorted(records, key=_age, reverse=query.order == "desc")
    start = 0
    if query.after is not None:
        ids = [record.id for record in ordered]
        if query.after not in ids:
            raise InvalidRequestError(
                f"after must be the id of a listed object, got {query.after!r:.80}", param="after"
            )
        start = ids.index(query.after) + 1
    shown = ordered[start : start + query.limit]
    return {
        "object": "list",
        "data": [record.show() for record in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": start + len(shown) < len(ordered),
    }


def _age(record: Record) -> tuple[float, str]:
    return record.created, record.id
