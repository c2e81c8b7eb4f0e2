"""What the administrators' routes are asked. Names as SGLang has them."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

Path: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class WeightsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which weights to load.

    model_path   folder or .gguf file on the server's machine, or a hub id
    load_format  if not given, whatever is there
    """

    model_path: Path
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] | None = None


class WeightRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which weight to show.

    name           as its checkpoint calls it
    truncate_size  how many of its first rows
    """

    name: Path
    truncate_size: Annotated[int, msgspec.Meta(ge=1, le=2**31)] = 100


class LogRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is not given stays as it is.

    log_requests             log each request when it ends
    log_requests_level       0: numbers; 1: also the beginning of prompt and answer; 2: all of both
    dump_requests_folder     write requests to files there; an empty name ends that
    dump_requests_threshold  requests to a file
    """

    log_requests: bool | None = None
    log_requests_level: Annotated[int, msgspec.Meta(ge=0, le=2)] | None = None
    dump_requests_folder: Annotated[str, msgspec.Meta(max_length=4096)] | None = None
    dump_requests_threshold: Annotated[int, msgspec.Meta(ge=1, le=10**9)] | None = None
