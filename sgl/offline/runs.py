"""What the benchmarks share: an engine, prompts of random ids, profiles, lines of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from sgl.bench.prompts import Writer
from sgl.config import Device, ServerConfig
from sgl.engine import Engine
from sgl.errors import ConfigError, RequestError
from sgl.hardware import choose_device, package_version
from sgl.model_files import resolve_model_path
from sgl.models.config import ModelConfig
from sgl.offline.settings import RunConfig

PROFILED_STEPS = 50  # of a profile; more make files that no viewer likes to open
HOW_TO_OPEN = (
    "Open it at https://ui.perfetto.dev; where a GPU waited: python scripts/gpu_gaps.py FILE"
)
_OF_A_SERVER_ONLY = {
    "config_file": None,
    "api_key": None,
    "api_key_file": None,
    "admin_api_key_file": None,
}


@contextmanager
def running(server: ServerConfig) -> Iterator[Engine]:
    """An engine with these settings; what it refuses, the operator can mend."""
    print(f"Starting an engine for {server.model_name} …", file=sys.stderr)
    try:
        with Engine(**(asdict(server) | _OF_A_SERVER_ONLY)) as engine:
            yield engine
    except RequestError as error:
        raise ConfigError(str(error)) from error


def device_of(server: ServerConfig) -> Device:
    return choose_device(server.device, tp_size=server.tp_size, base_gpu_id=server.base_gpu_id)


def vocab_size(server: ServerConfig) -> int:
    return ModelConfig.load(resolve_model_path(server), server.model_overrides).vocab_size


def answer_ids(
    engine: Engine, prompts: Sequence[Sequence[int]], output_len: int
) -> list[Mapping[str, Any]]:
    """Answer all prompts at once, greedily, each with exactly `output_len` tokens."""
    sampling = {"temperature": 0.0, "max_new_tokens": output_len, "ignore_eos": True}
    answers: list[Mapping[str, Any]] = engine.generate(input_ids=prompts, sampling_params=sampling)
    return answers


def random_batch(writer: Writer, num_prompts: int, input_len: int) -> list[list[int]]:
    return [writer.ids(input_len) for _ in range(num_prompts)]


@contextmanager
def profiled(engine: Engine, config: RunConfig) -> Iterator[None]:
    """Record the first steps of what happens inside, and say where they are."""
    engine.start_profile(config.profile_folder, num_steps=PROFILED_STEPS)
    yield
    print(f"{engine.stop_profile()}\n{HOW_TO_OPEN}", file=sys.stderr)


def write_result(config: RunConfig, server: ServerConfig, values: Mapping[str, Any]) -> None:
    """Append a line to --result-filename, if there is one."""
    if config.result_filename is None:
        return
    line = {
        "run_name": config.run_name,
        "model": server.model_name,
        "device": device_of(server),
        "tp_size": server.tp_size,
        "version": package_version("sgl"),
        **values,
    }
    with open(config.result_filename, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
