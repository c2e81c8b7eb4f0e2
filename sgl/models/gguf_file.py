"""A GGUF file, mapped into memory: its metadata, and its tensors as float32.

    metadata │ tensor name, shape, type, offset … │ data

Only the data is read lazily. The `gguf` package knows the quantised types.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sgl.errors import ConfigError
from sgl.gguf_metadata import GgufCursor, Value, damage_refused, map_file

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
        with damage_refused(path):
            self._data = map_file(path)
            cursor = GgufCursor(self._data)
            self.metadata, num_tensors = cursor.read_head()
            self.tensors = _read_tensors(cursor, num_tensors, self.metadata)
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


def _read_tensors(
    cursor: GgufCursor, num_tensors: int, metadata: Mapping[str, Value]
) -> dict[str, GgufTensor]:
    """Their descriptions follow the metadata; the data of all begins at the next aligned byte."""
    tensors = [(cursor.text(), _read_tensor(cursor)) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    return {name: tensor._replace(offset=start + tensor.offset) for name, tensor in tensors}


def _read_tensor(cursor: GgufCursor) -> GgufTensor:
    num_axes = cursor.number("I")
    shape = tuple(cursor.number("Q") for _ in range(num_axes))[::-1]
    return GgufTensor(shape, type_id=cursor.number("I"), offset=cursor.number("Q"))
