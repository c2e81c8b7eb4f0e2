"""Where weights come from: safetensors files, a GGUF file, or a random generator.

Each gives tensors under the names Hugging Face checkpoints use. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgl.errors import ConfigError
from sgl.models.gguf_checkpoint import checkpoint_name, has_paired_rows, is_skipped
from sgl.models.gguf_file import GgufFile, find_gguf

LoadFormat: TypeAlias = Literal["auto", "safetensors", "gguf", "dummy"]

INDEX_NAME = "model.safetensors.index.json"
CHUNK_LEN = 1 << 22  # numbers dequantised at a time: 16 MiB of float32
DUMMY_STD = 0.02


class TensorHead(NamedTuple):
    """What is known of a tensor before it is read; `kind` is its type as safetensors calls it."""

    name: str
    shape: tuple[int, ...]
    kind: str = "F32"


class Checkpoint(NamedTuple):
    """`source` is where the tensors are from, for messages; `tensors` reads them one by one."""

    source: str
    heads: list[TensorHead]
    tensors: Iterator[tuple[str, Tensor]]


def open_checkpoint(
    path: Path, load_format: LoadFormat, dtype: torch.dtype, head_dim: int
) -> Checkpoint:
    """The weights in a folder or file; "auto" takes safetensors before GGUF."""
    files = _safetensors_files(path) if load_format in ("auto", "safetensors") else {}
    if files:
        return Checkpoint(str(path), list(_safetensors_heads(files)), _safetensors(files))
    gguf_path = find_gguf(path) if load_format in ("auto", "gguf") else None
    if gguf_path is None:
        raise ConfigError(_nothing_found(path, load_format))
    file = GgufFile(gguf_path)
    return Checkpoint(str(gguf_path), list(_gguf_heads(file)), _gguf(file, dtype, head_dim))


def dummy_checkpoint(
    wanted: list[TensorHead], device: torch.device, dtype: torch.dtype
) -> Checkpoint:
    """Random weights, small enough for finite logits.

    A tensor depends on its name alone: ranks that hold parts hold parts of the same model.
    """
    tensors = ((head.name, _random(head.name, head.shape, device, dtype)) for head in wanted)
    return Checkpoint("random weights", wanted, tensors)


def _random(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, device=device, dtype=dtype)
    if name.endswith("norm.weight"):
        return tensor.fill_(1.0)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    half_width = DUMMY_STD * 3**0.5  # uniform numbers cost half of normal ones
    return tensor.uniform_(-half_width, half_width, generator=generator)


def _safetensors_files(path: Path) -> dict[Path, list[str]]:
    """The tensors to take from each file, after the index if there is one."""
    index_path = path / INDEX_NAME
    if index_path.is_file():
        return _indexed_files(index_path)
    found = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
    files = {}
    for file_path in found:
        with _opened(file_path) as file:
            files[file_path] = list(file.keys())
    return files


def _indexed_files(index_path: Path) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    try:
        for name, file_name in json.loads(index_path.read_text("utf-8"))["weight_map"].items():
            if Path(file_name).name != file_name:
                raise ValueError(f"{file_name!r} is no name of a file beside it")
            files.setdefault(index_path.with_name(file_name), []).append(name)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{index_path} is no index of weights: {error!r}") from None
    absent = [file_path.name for file_path in files if not file_path.is_file()]
    if absent:
        raise ConfigError(f"{index_path} names files that are not there: {', '.join(absent)}")
    return files


def _safetensors_heads(files: dict[Path, list[str]]) -> Iterator[TensorHead]:
    for path, name, file in _places(files):
        with _readable(path, name):
            entry = file.get_slice(name)
            yield TensorHead(name, tuple(entry.get_shape()), entry.get_dtype())


def _safetensors(files: dict[Path, list[str]]) -> Iterator[tuple[str, Tensor]]:
    for path, name, file in _places(files):
        with _readable(path, name):
            tensor = file.get_tensor(name)
        yield name, tensor


def _places(files: dict[Path, list[str]]) -> Iterator[tuple[Path, str, safe_open]]:
    for path, names in files.items():
        with _opened(path) as file:
            for name in names:
                yield path, name, file


@contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ConfigError(f"{path}: {name} cannot be read: {error}") from None


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")  # maps the file: only what is used is read
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is no whole safetensors file: {error}; get it again") from None


def _gguf_heads(file: GgufFile) -> Iterator[TensorHead]:
    for gguf_name in _gguf_names(file):
        name, shape = checkpoint_name(gguf_name), file.tensors[gguf_name].shape
        if name is None:
            raise ConfigError(f"{file.path} has a tensor {gguf_name!r}, which no model here knows")
        file.rows(gguf_name, max(0, shape[0] - 1), shape[0])  # refused now if the file ends before
        yield TensorHead(name, shape)


def _gguf(file: GgufFile, dtype: torch.dtype, head_dim: int) -> Iterator[tuple[str, Tensor]]:
    for gguf_name in _gguf_names(file):
        name = checkpoint_name(gguf_name)
        assert name is not None, "the heads were read before"
        tensor = _dequantised(file, gguf_name, dtype)
        if has_paired_rows(file, gguf_name):
            tensor = halved_rows(tensor, head_dim)
        yield name, tensor


def _gguf_names(file: GgufFile) -> list[str]:
    return [name for name in file.tensors if not is_skipped(name)]


def _dequantised(file: GgufFile, name: str, dtype: torch.dtype) -> Tensor:
    num_rows, *row_shape = file.tensors[name].shape
    tensor = torch.empty(num_rows, *row_shape, dtype=dtype)
    num_at_once = max(1, CHUNK_LEN // max(1, tensor[:1].numel()))
    for first in range(0, num_rows, num_at_once):
        last = min(first + num_at_once, num_rows)
        tensor[first:last] = torch.from_numpy(file.rows(name, first, last))
    return tensor


def halved_rows(tensor: Tensor, head_dim: int) -> Tensor:
    """Bring each head's rows from x0 y0 x1 y1 … to x0 x1 … y0 y1 …"""
    pairs = tensor.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _nothing_found(path: Path, load_format: LoadFormat) -> str:
    names = [file.name for kind in ("bin", "pt", "pth") for file in path.glob(f"*.{kind}")]
    if names and load_format != "gguf":
        return (
            f"{path} has its weights in {names[0]}, a format that can run code when it is read: "
            "convert it to safetensors (transformers: model.save_pretrained(folder))"
        )
    wanted = {"safetensors": "*.safetensors", "gguf": "*.gguf"}.get(
        load_format, "*.safetensors or *.gguf"
    )
    return (
        f"{path} has no {wanted} file: give a folder that has, another --load-format, or "
        "--load-format dummy for random weights"
    )
