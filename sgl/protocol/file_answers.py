"""The JSON of files and batches."""

from __future__ import annotations

from typing import Literal, TypedDict

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]


class FileObject(TypedDict):
    """What is known of a file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None
    expires_at: None


class FileList(TypedDict):
    """A page of files.

    first_id, last_id   null if the page is empty
    has_more            ask for the next page with after=last_id
    """

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(TypedDict):
    id: str
    object: Literal["file"]
    deleted: bool


class BatchErrorObject(TypedDict):
    """Why a batch as a whole failed.

    line   of the input file, if it is the fault of one
    """

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(TypedDict):
    object: Literal["list"]
    data: list[BatchErrorObject]


class LineCounts(TypedDict):
    total: int
    completed: int
    failed: int


class BatchObject(TypedDict):
    """How far a batch is; times are in seconds since 1970.

    output_file_id, error_file_id   set when no line is answered any more
    """

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: LineCounts
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    """A page of batches.

    first_id, last_id   null if the page is empty
    has_more            ask for the next page with after=last_id
    """

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
