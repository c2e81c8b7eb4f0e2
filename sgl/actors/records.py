"""Small records on disk, one JSON file each: read when asked for, replaced as a whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec

logger = logging.getLogger(__name__)


class Named(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Named)


class RecordFolder(Generic[T]):
    """FOLDER/ID.json for each record whose id starts with `prefix`. Callers check ids before.

    All methods wait for the disk: call them in a thread.
    """

    def __init__(self, folder: Path, prefix: str, record_type: type[T]) -> None:
        self._folder = folder
        self._prefix = prefix
        self._decoder = msgspec.json.Decoder(record_type)

    def read(self, record_id: str) -> T | None:
        """None if there is none, or none that can be read."""
        try:
            return self._decoder.decode(self._path(record_id).read_bytes())
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            logger.warning("%s is damaged: %s", self._path(record_id), error)
            return None

    def write(self, record: T) -> None:
        self.write_encoded(record.id, msgspec.json.encode(record))

    def write_encoded(self, record_id: str, encoded: bytes) -> None:
        """Whoever reads meanwhile, or after a crash, finds the old record or the new one."""
        path = self._path(record_id)
        temporary = path.with_suffix(".json.tmp")
        with open(temporary, "wb", opener=private) as file:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def remove(self, record_id: str) -> bool:
        """False if there was none."""
        try:
            self._path(record_id).unlink()
        except FileNotFoundError:
            return False
        return True

    def ids(self) -> list[str]:
        return [path.stem for path in self._folder.glob(f"{self._prefix}*.json")]

    def all(self) -> Iterator[T]:
        for record_id in self.ids():
            record = self.read(record_id)
            if record is not None:
                yield record

    def _path(self, record_id: str) -> Path:
        return self._folder / f"{record_id}.json"


def private(path: str, flags: int) -> int:
    """An opener for `open`: nobody else may read what is made, and links are not followed."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
