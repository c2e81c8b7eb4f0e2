"""`/v1/batches`: what is kept of a batch, and the lines that it reads and writes.

{"custom_id", "method", "url", "body"} ── LineParser ──▶ Line ── handler's parser ──▶ call
{"id", "custom_id", "response": {"status_code", "request_id", "body"}} ◀── LineAnswer
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sgl.errors import InvalidRequestError, NotFoundError
from sgl.protocol.body import convert, one_of, parse_fields
from sgl.protocol.file_answers import BatchErrorObject, BatchObject, Status
from sgl.protocol.files import PageQuery

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
WINDOW, WINDOW_S = "24h", 24 * 3600
MAX_LISTED_BATCHES, NUM_LISTED_BATCHES = 100, 20
MAX_PAIRS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512

_BATCH_ID = re.compile("batch_[0-9a-f]{32}")

ENDED = frozenset(("failed", "completed", "expired", "cancelled"))


Metadata = Annotated[
    dict[
        Annotated[str, Meta(max_length=MAX_KEY_CHARS)],
        Annotated[str, Meta(max_length=MAX_VALUE_CHARS)],
    ],
    Meta(max_length=MAX_PAIRS),
]


class BatchQuery(PageQuery, kw_only=True, frozen=True):
    """Which batches."""

    limit: Annotated[int, Meta(ge=1, le=MAX_LISTED_BATCHES)] = NUM_LISTED_BATCHES


class BatchError(msgspec.Struct, kw_only=True):
    """Why a batch as a whole failed."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchRecord(msgspec.Struct, kw_only=True):
    """The state of a batch, as it is kept on disk; times are in seconds since 1970.

    model           the server's name for the model that made it: only the same one goes on
    output_file_id  these two are set once no line is answered any more
    error_file_id
    """

    id: str
    input_file_id: str
    endpoint: str
    model: str
    created: float
    metadata: dict[str, str] | None = None
    status: Status = "validating"
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[BatchError] = []

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def expires(self) -> float:
        return self.created + WINDOW_S

    @property
    def is_answered(self) -> bool:
        """Every line has its answer."""
        return self.num_completed + self.num_failed == self.num_lines > 0

    @property
    def is_closing(self) -> bool:
        """No line is answered any more, whatever happens."""
        has_files = self.output_file_id is not None or self.error_file_id is not None
        return has_files or self.status in ("finalizing", "cancelling")

    def enter(self, status: Status, now: float) -> None:
        """Change the status and note when."""
        self.status = status
        setattr(self, f"{status}_at", int(now))

    def show(self) -> BatchObject:
        errors: list[BatchErrorObject] = [msgspec.to_builtins(error) for error in self.errors]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": WINDOW,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": int(self.created),
            "in_progress_at": self.in_progress_at,
            "expires_at": int(self.expires),
            "finalizing_at": self.finalizing_at,
            "completed_at": self.completed_at,
            "failed_at": self.failed_at,
            "expired_at": self.expired_at,
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self.cancelled_at,
            "request_counts": {
                "total": self.num_lines,
                "completed": self.num_completed,
                "failed": self.num_failed,
            },
            "metadata": self.metadata,
        }


class BatchBody(msgspec.Struct, kw_only=True):
    """The fields of a POST to `/v1/batches`.

    input_file_id         a file with a request on each line
    endpoint              of all lines
    completion_window     after it the batch is expired
    metadata              anything of yours, which is told with the batch
    output_expires_after  not supported: files are kept until they are deleted
    """

    input_file_id: str
    endpoint: Annotated[str, one_of(*ENDPOINTS)]
    completion_window: Annotated[str, one_of(WINDOW)]
    metadata: Metadata | None = None
    output_expires_after: dict[str, Any] | None = None


def parse_batch(body: bytes) -> BatchBody:
    """What is asked for; raises InvalidRequestError."""
    wanted = convert(parse_fields(body), BatchBody)
    if wanted.endpoint not in ENDPOINTS:
        raise InvalidRequestError(
            f"endpoint must be {' or '.join(ENDPOINTS)}, got {wanted.endpoint!r:.80}",
            param="endpoint",
        )
    if wanted.completion_window != WINDOW:
        raise InvalidRequestError(
            f'completion_window must be "{WINDOW}", got {wanted.completion_window!r:.40}',
            param="completion_window",
        )
    if wanted.output_expires_after is not None:
        raise InvalidRequestError(
            "output_expires_after is not supported: files are kept until they are deleted",
            param="output_expires_after",
        )
    return wanted


def check_batch_id(batch_id: str) -> str:
    """`batch_id`, which becomes part of a path; raises NotFoundError if no batch can be so."""
    if _BATCH_ID.fullmatch(batch_id) is None:
        raise no_batch(batch_id)
    return batch_id


def no_batch(batch_id: str) -> NotFoundError:
    return NotFoundError(
        f"there is no batch {batch_id!r:.80}: GET /v1/batches lists all", param="id"
    )
