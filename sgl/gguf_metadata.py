"""The first part of a GGUF file: what it says about its model, before the first tensor.

    magic, version, number of tensors and of entries │ key, type, value … │ tensors …

Read without the `gguf` package: its reader keeps an array for each of 100,000 vocabulary entries
and takes four seconds for that; this one takes some 50 ms.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from sgl.errors import ConfigError

Value: TypeAlias = int | float | bool | str | list["Value"]

_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRUCTS = {code: struct.Struct(f"<{code}") for code in ("4s", *_NUMBERS.values())}
_STRING, _ARRAY = 8, 9
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_gguf_metadata(path: Path) -> dict[str, Value]:
    """All entries of a file. Raises ConfigError where it is damaged or cut short."""
    with damage_refused(path), map_file(path) as data:
        return GgufCursor(data).read_head()[0]


def end_ids(metadata: Mapping[str, Value]) -> list[int]:
    """The tokens that end an answer, each once."""
    found = (metadata.get(f"tokenizer.ggml.{name}") for name in _ENDS)
    return list(dict.fromkeys(token_id for token_id in found if isinstance(token_id, int)))


def map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def damage_refused(path: Path) -> Iterator[None]:
    """What goes wrong while the file is parsed becomes a ConfigError."""
    try:
        yield
    except (OSError, ValueError, LookupError, RecursionError, struct.error) as error:
        raise ConfigError(f"{path} is no whole GGUF file: {error}; get it again") from None


class GgufCursor:
    """Reads values one after the other, from the start on; all numbers are little-endian."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.offset = 0

    def read_head(self) -> tuple[dict[str, Value], int]:
        """The entries, and how many tensors are described behind them."""
        magic, version = self.number("4s"), self.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it starts with {magic!r}, version {version}")
        num_tensors, num_entries = self.number("Q"), self.number("Q")
        entries = {self.text(): self._value(self.number("I")) for _ in range(num_entries)}
        return entries, num_tensors

    def number(self, code: str) -> Any:
        packed = _STRUCTS[code]
        [value] = packed.unpack_from(self._data, self.offset)
        self.offset += packed.size
        return value

    def text(self) -> str:
        length = self.number("Q")
        start, self.offset = self.offset, self.offset + length
        if self.offset > len(self._data):
            raise ValueError("it ends within a string")
        return str(self._data[start : self.offset], "utf-8")

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            number: Value = self.number(_NUMBERS[kind])
            return number
        kind, length = self.number("I"), self.number("Q")
        if kind not in _NUMBERS:
            return [self._value(kind) for _ in range(length)]
        packed = struct.Struct(f"<{length}{_NUMBERS[kind]}")
        values = list(packed.unpack_from(self._data, self.offset))
        self.offset += packed.size
        return values
