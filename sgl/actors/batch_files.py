"""The files of one batch while it runs: its input, its answers so far, and a lock.

    FOLDER/file-ID.data            lines to answer
    FOLDER/batch_ID.output.part    answers of good lines  ┐ appended to; become files of /v1/files
    FOLDER/batch_ID.errors.part    answers of bad lines   ┘ when the batch ends
    FOLDER/batch_ID.lock           held by the server that runs the batch

All of this waits for the disk: call it in a thread.
"""

from __future__ import annotations

import codecs
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sgl.actors.records import private
from sgl.protocol.batch_lines import LineAnswer, answered_number


def input_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Number and text of each line that is not empty; None for one of more than `max_bytes`."""
    with open(path, "rb") as file:
        number = 0
        while text := file.readline(max_bytes + 1):
            number += 1
            if number == 1:
                text = text.removeprefix(codecs.BOM_UTF8)
            is_whole = text.endswith(b"\n") or len(text) <= max_bytes
            if not is_whole:
                _skip_line(file)
                yield number, None
            elif text := text.strip():
                yield number, text


def _skip_line(file: BinaryIO) -> None:
    while (text := file.readline(2**20)) and not text.endswith(b"\n"):
        pass


class AnswerFile:
    """Answers that are appended, and the numbers of the lines they answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.numbers: set[int] = set()
        self._file: BinaryIO | None = None

    def open(self) -> None:
        """Find out what is answered; half a line, which a crash left behind, is cut off."""
        if self._file is not None:
            return
        self._file = open(self.path, "a+b", opener=private)  # noqa: SIM115
        self._file.seek(0)
        num_whole_bytes = 0
        for answer in self._file:
            if answer.endswith(b"\n"):
                num_whole_bytes += len(answer)
                number = answered_number(answer)
                if number is not None:
                    self.numbers.add(number)
        self._file.truncate(num_whole_bytes)

    def append(self, batch_id: str, answers: Sequence[LineAnswer]) -> None:
        assert self._file is not None, "open it first"
        self._file.write(b"".join(answer.encode(batch_id) for answer in answers))
        self._file.flush()
        self.numbers.update(answer.line.number for answer in answers)

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


class BatchFiles:
    """What a batch has written; of several servers with one folder only one can hold its lock."""

    def __init__(self, folder: Path, batch_id: str) -> None:
        self._batch_id = batch_id
        self._lock_path = folder / f"{batch_id}.lock"
        self._lock: int | None = None
        self.output = AnswerFile(folder / f"{batch_id}.output.part")
        self.errors = AnswerFile(folder / f"{batch_id}.errors.part")

    def lock(self) -> bool:
        """False if another server runs the batch. The kernel unlocks what a dead server held."""
        lock = private(str(self._lock_path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        return True

    def open(self) -> None:
        self.output.open()
        self.errors.open()

    def append(self, answers: Sequence[LineAnswer]) -> None:
        for file, is_good in ((self.output, True), (self.errors, False)):
            if mine := [answer for answer in answers if answer.is_good is is_good]:
                file.append(self._batch_id, mine)

    def close(self) -> None:
        """Leave the answers where they are, for whoever goes on."""
        self.output.close()
        self.errors.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """The batch has ended; what was worth keeping has been adopted."""
        self.close()
        for path in (self.output.path, self.errors.path, self._lock_path):
            with suppress(FileNotFoundError):
                path.unlink()
