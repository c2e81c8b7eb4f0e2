"""The files of `/v1/files` on disk. There is no other state: a restart finds everything again.

    FOLDER/file-ID.data.tmp ── rename ──▶ FOLDER/file-ID.data     first the bytes,
    FOLDER/file-ID.json.tmp ── rename ──▶ FOLDER/file-ID.json     then what makes it a file

A file is there if its .json is. A crash leaves at most a .tmp, or a .data without a .json; `sweep`
takes them away when they are old.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sgl.actors.records import RecordFolder, private
from sgl.errors import InvalidRequestError, RequestTooLargeError
from sgl.protocol.files import FileRecord, check_file_id, no_file

MAX_FILES = 10_000
LEFTOVER_AGE_S = 24 * 3600.0  # younger ones may be an upload to another server


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"


class FileStore:
    """The files in one folder. All methods wait for the disk: call them in a thread."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._records = RecordFolder(folder, "file-", FileRecord)

    def begin(self) -> Upload:
        """A new file, which is there once it is committed; makes the folder."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(self._records.ids()) >= MAX_FILES:
            raise InvalidRequestError(
                f"the server keeps {MAX_FILES} files already: delete some of them first"
            )
        return Upload(self, new_file_id())

    def get(self, file_id: str) -> FileRecord:
        """Raises NotFoundError."""
        record = self._records.read(check_file_id(file_id))
        if record is None:
            raise no_file(file_id)
        return record

    def all(self) -> list[FileRecord]:
        return list(self._records.all())

    def data_path(self, file_id: str) -> Path:
        return self.folder / f"{check_file_id(file_id)}.data"

    def delete(self, file_id: str) -> None:
        """Raises NotFoundError."""
        if not self._records.remove(check_file_id(file_id)):
            raise no_file(file_id)
        self.data_path(file_id).unlink(missing_ok=True)

    def adopt(self, path: Path, file_id: str, filename: str, purpose: str) -> None:
        """Make the file at `path`, in the same folder, one of these.

        After a crash it may be called again, with the same arguments, and goes on where it was.
        """
        data_path = self.data_path(file_id)
        with suppress(FileNotFoundError):  # it is renamed already
            path.replace(data_path)
        self._records.write(
            FileRecord(
                id=file_id,
                num_bytes=data_path.stat().st_size,
                created=time.time(),
                filename=filename,
                purpose=purpose,
            )
        )

    def sweep(self, kept_ids: Collection[str] = ()) -> None:
        """Remove what crashes left behind, but no data of `kept_ids`."""
        files = set(self._records.ids()).union(kept_ids)
        oldest = time.time() - LEFTOVER_AGE_S
        for path in self.folder.glob("*"):
            is_orphan = path.suffix == ".data" and path.stem not in files
            if is_orphan or path.suffix == ".tmp":
                _remove_if_older(path, oldest)


class Upload:
    """A file that is coming in: write pieces, then commit; discard undoes what was not committed.

    All methods wait for the disk: call them in a thread, one at a time.
    """

    def __init__(self, store: FileStore, file_id: str) -> None:
        self._store = store
        self._file_id = file_id
        self._path = store.folder / f"{file_id}.data.tmp"
        self._file: BinaryIO = open(self._path, "xb", opener=private)  # noqa: SIM115
        self._num_bytes = 0

    def write(self, piece: bytes) -> None:
        """Raises RequestTooLargeError once it is too much."""
        self._num_bytes += len(piece)
        if self._num_bytes > self._store.max_bytes:
            raise file_too_large(self._store.max_bytes)
        self._file.write(piece)

    def commit(self, filename: str, purpose: str) -> FileRecord:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._store.adopt(self._path, self._file_id, filename, purpose)
        return self._store.get(self._file_id)

    def discard(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def file_too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the file is larger than {max_bytes} bytes: send it in parts, or start the server with a "
        "larger --max-file-mb"
    )


def _remove_if_older(path: Path, oldest: float) -> None:
    with suppress(FileNotFoundError):  # somebody else was faster
        if path.stat().st_mtime < oldest:
            path.unlink()
