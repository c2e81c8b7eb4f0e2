"""Requests and their answers as JSON lines on disk, for whoever wants to look at them later.

    add ──▶ thread: FOLDER/requests-TIME-RANDOM.jsonl, so many lines, then the next file

Whatever happens to the disk, no request waits for it or fails because of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from sgl.errors import InvalidRequestError

logger = logging.getLogger(__name__)

MAX_WAITING = 1000  # records that a slow disk keeps in memory


class RequestDump:
    """One folder, which is made if it is missing; `num_lines` go into a file.

    Folder and files are for the server's user alone: they hold what clients have said.
    """

    def __init__(self, folder: Path, num_lines: int) -> None:
        """Raises InvalidRequestError where nothing can be written; waits for the disk."""
        self.folder = folder
        self._num_lines = num_lines
        self._room = threading.Semaphore(MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dump")
        self._fd = -1
        self._num_written = 0
        self._is_failing = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = folder / f".{uuid.uuid4().hex}"
            os.close(_create(probe))
            probe.unlink()
        except (OSError, ValueError) as error:  # ValueError: a zero byte
            raise InvalidRequestError(
                f"requests cannot be written to {str(folder)!r}: {error}; give another "
                "dump_requests_folder",
                param="dump_requests_folder",
            ) from None

    def add(self, encode: Callable[[], bytes]) -> None:
        """Write the record that `encode` makes on the thread; left out if too many wait."""
        if self._room.acquire(blocking=False):
            self._thread.submit(self._write, encode)
        else:
            self._complain("the disk is too slow: a request was not written")

    def close(self) -> None:
        """What was added is still written; nothing more may be."""
        self._thread.submit(self._end_file)
        self._thread.shutdown(wait=False)

    def _write(self, encode: Callable[[], bytes]) -> None:
        try:
            if self._fd < 0:
                name = f"requests-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.jsonl"
                self._fd, self._num_written = _create(self.folder / name), 0
            _write_all(self._fd, encode() + b"\n")
            self._num_written += 1
            self._is_failing = False
            if self._num_written >= self._num_lines:
                self._end_file()
        except OSError as error:
            self._complain(str(error))
            self._end_file()  # it may end in the middle of a line
        except Exception:  # nobody would see it otherwise
            logger.exception("a request cannot be dumped")
        finally:
            self._room.release()

    def _end_file(self) -> None:
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)
        self._fd = -1

    def _complain(self, what: str) -> None:
        """Once, until a record is written again."""
        if not self._is_failing:
            logger.error("Requests are not dumped to %s: %s", self.folder, what)
        self._is_failing = True


def _create(path: Path) -> int:
    """A new file, never one that somebody has put there."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
