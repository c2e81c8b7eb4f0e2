"""`/v1/files`: what is known of a file, and how lists of files and batches are told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from sgl.errors import InvalidRequestError, NotFoundError
from sgl.protocol.body import check_name

MAX_FILENAME_CHARS = 255
MAX_LISTED_FILES = 10_000
PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
BATCH_OUTPUT = "batch_output"

_FILE_ID = re.compile("file-[0-9a-f]{32}")


class FileRecord(msgspec.Struct, kw_only=True, frozen=True):
    """What is kept of a file beside its bytes; `created` is in seconds since 1970."""

    id: str
    num_bytes: int
    created: float
    filename: str
    purpose: str

    def show(self) -> dict[str, Any]:
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


def deleted_file(file_id: str) -> dict[str, Any]:
    return {"id": file_id, "object": "file", "deleted": True}


class Record(Protocol):
    """A file or a batch."""

    @property
    def id(self) -> str: ...

    @property
    def created(self) -> float: ...

    def show(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Record)


class PageQuery(msgspec.Struct, kw_only=True, frozen=True):
    """Which part of a list a client wants, newest first unless `is_ascending`."""

    limit: int
    after: str | None = None
    is_ascending: bool = False


def parse_page_query(query: Mapping[str, str], *, default: int, most: int) -> PageQuery:
    """`limit`, `after` and `order` of a GET; raises InvalidRequestError."""
    limit, order = query.get("limit", str(default)), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= most):
        raise InvalidRequestError(
            f"limit must be from 1 to {most}, got {limit!r:.40}", param="limit"
        )
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order must be asc or desc, got {order!r:.40}", param="order")
    return PageQuery(limit=int(limit), after=query.get("after"), is_ascending=order == "asc")


def page(records: Sequence[R], query: PageQuery) -> dict[str, Any]:
    """The records of one page as a list object; raises InvalidRequestError."""
    ordered = sorted(records, key=_age, reverse=not query.is_ascending)
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
