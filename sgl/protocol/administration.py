"""What the administrators' routes are asked. Names as SGLang has them."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

Path: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class WeightsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`/update_weights_from_disk`.

    model_path   folder or .gguf file on the server's machine, or a hub id
    load_format  None: whatever is there
    """

    model_path: Path
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] | None = None


class WeightRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`/get_weights_by_name`: a weight as its checkpoint calls it, and how many rows to show."""

    name: Path
    truncate_size: Annotated[int, msgspec.Meta(ge=1, le=2**31)] = 100


class LogRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`/configure_logging`: what is not given stays as it is; an empty folder ends the dump."""

    log_requests: bool | None = None
    log_requests_level: Annotated[int, msgspec.Meta(ge=0, le=2)] | None = None
    dump_requests_folder: Annotated[str, msgspec.Meta(max_length=4096)] | None = None
    dump_requests_threshold: Annotated[int, msgspec.Meta(ge=1, le=10**9)] | None = None
