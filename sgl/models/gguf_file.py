"""A GGUF file, mapped into memory: its metadata, and its tensors as float32.

    magic, version, counts │ key, type, value … │ tensor name, shape, type, offset … │ data

Only the data is read lazily. The `gguf` package knows the quantised types; its reader is not used,
since it keeps an array for each of 100,000 vocabulary entries and takes four seconds for that.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from sgl.errors import ConfigError

Value: TypeAlias = int | float | bool | str | list["Value"]

_NUMBERS = dict(zip(range(8), "BbHhIif?", strict=True)) | {10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_F32 = 0


class GgufTensor(NamedTuple):
    """Where a tensor lies. `shape` is as numpy counts it: the last axis is the contiguous one."""

    shape: tuple[int, ...]
    type_id: int
    offset: int


class GgufFile:
    """The parsed head of one file; raises ConfigError where it is damaged or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self.tensors = _Head(self._data).parse()
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise ConfigError(f"{path} is no whole GGUF file: {error}; get it again") from None
        if self.metadata.get("split.count", 1) != 1:
            raise ConfigError(f"{path} is one of several: join them (llama-gguf-split --merge)")

    def rows(self, name: str, first: int, last: int) -> npt.NDArray[np.float32]:
        """Rows [first, last) of a tensor's first axis, dequantised."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        try:
            type_id = GGMLQuantizationType(tensor.type_id)
            block_len, block_size = GGML_QUANT_SIZES[type_id]
            row_shape = tensor.shape[1:]
            row_len = int(np.prod(row_shape))
            num_bytes = (last - first) * row_len // block_len * block_size
            start = tensor.offset + first * row_len // block_len * block_size
            if start + num_bytes > len(self._data):
                raise ValueError("its data ends after the file")
            block = np.frombuffer(self._data, np.uint8, num_bytes, start)
            # as one long row: the package works through short rows sixteen at a time
            values = dequantize(block[None], type_id).reshape(last - first, *row_shape)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"{self.path}: {name} cannot be read: {error}") from None
        return np.array(values, dtype=np.float32)  # a copy where the file holds float32 itself

    def floats(self, name: str) -> list[float]:
        """A small one-dimensional tensor that is kept as float32."""
        tensor = self.tensors[name]
        if tensor.type_id != _F32 or len(tensor.shape) != 1:
            raise ConfigError(f"{self.path}: {name} should be a list of float32")
        return list(struct.unpack_from(f"<{tensor.shape[0]}f", self._data, tensor.offset))


def find_gguf(path: Path) -> Path | None:
    """`path` itself, or the one GGUF file in the folder `path`; None where there is none."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConfigError(f"{path} holds several models: give one of {names} as --model-path")
    return found[0] if found else None


class _Head:
    """A cursor over everything before the tensor data."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def parse(self) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
        magic, version = self._take("4s"), self._take("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it starts with {magic!r}, version {version}")
        num_tensors, num_entries = self._take("Q"), self._take("Q")
        metadata = {self._text(): self._value(self._take("I")) for _ in range(num_entries)}
        tensors = [(self._text(), self._tensor()) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return metadata, {name: at._replace(offset=start + at.offset) for name, at in tensors}

    def _tensor(self) -> GgufTensor:
        num_axes = self._take("I")
        shape = tuple(self._take("Q") for _ in range(num_axes))[::-1]
        return GgufTensor(shape, type_id=self._take("I"), offset=self._take("Q"))

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            number: Value = self._take(_NUMBERS[kind])
            return number
        kind, length = self._take("I"), self._take("Q")
        if kind not in _NUMBERS:
            return [self._value(kind) for _ in range(length)]
        packed = struct.Struct(f"<{length}{_NUMBERS[kind]}")
        values = list(packed.unpack_from(self._data, self._at))
        self._at += packed.size
        return values

    def _text(self) -> str:
        length = self._take("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise ValueError("it ends within a string")
        return str(self._data[start : self._at], "utf-8")

    def _take(self, code: str) -> Any:
        packed = _STRUCTS[code]
        [value] = packed.unpack_from(self._data, self._at)
        self._at += packed.size
        return value


_STRUCTS = {code: struct.Struct(f"<{code}") for code in ("4s", *_NUMBERS.values())}
