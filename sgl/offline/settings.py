"""The flags of the benchmarks without HTTP; every flag of the server may be typed among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sgl.bench.settings import DEFAULT_NUM_PROMPTS, ServingConfig
from sgl.config import ALL_OPTIONS, ServerConfig
from sgl.errors import ConfigError
from sgl.flags import OptionTable, Value, field_options, flag

ConfigT = TypeVar("ConfigT", bound="RunConfig")

DATASETS = ("random", "generated-shared-prefix", "sharegpt")
_QUIET: dict[str, Value] = {"log_level": "warning"}
_SERVING_FIELDS = {each.name: each for each in dataclasses.fields(ServingConfig)}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What all of them have (raises ConfigError)."""

    run_name: str = flag("name of the run in its results", default="default", metavar="NAME")
    result_filename: str | None = flag("append a JSON line for each result", metavar="FILE")
    profile: bool = flag("also write a profile of the first steps", default=False)
    profile_folder: str | None = flag(
        "folder of the profiles",
        default_text="$SGL_TORCH_PROFILER_DIR, else /tmp",
        metavar="FOLDER",
    )
    seed: int = flag("the same seed gives the same prompts", default=1)

    def __post_init__(self) -> None:
        for option in field_options(type(self)):
            option.check(getattr(self, option.key))
        if self.profile_folder is not None and not self.profile:
            raise ConfigError("--profile-folder is where --profile writes: give both")
        if self.result_filename is not None:
            _check_appendable(self.result_filename)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyConfig(RunConfig):
    """The flags of `sgl bench latency`, besides those of the server."""

    batch_size: tuple[int, ...] = flag("requests at the same time", default=(1,), low=1)
    input_len: tuple[int, ...] = flag("tokens of each prompt", default=(1024,), low=1)
    output_len: tuple[int, ...] = flag("tokens of each answer", default=(16,), low=1)
    correctness_test: bool = flag(
        "do not measure: print how the model goes on from a few prompts", default=False
    )


def _as_in_serving(name: str) -> Any:
    """A flag that `sgl bench serving` has, too."""
    each = _SERVING_FIELDS[name]
    return dataclasses.field(default=each.default, metadata=each.metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputConfig(RunConfig):
    """The flags of `sgl bench offline-throughput`, besides those of the server."""

    dataset_name: str = flag("what to answer", default="random", choices=DATASETS)
    dataset_path: str | None = flag("file of sharegpt", metavar="FILE")
    num_prompts: int | None = flag(
        "how many requests",
        default_text=f"{DEFAULT_NUM_PROMPTS}; generated-shared-prefix: all",
        low=1,
    )
    random_input_len: int = _as_in_serving("random_input_len")
    random_output_len: int = _as_in_serving("random_output_len")
    random_range_ratio: float = _as_in_serving("random_range_ratio")
    sharegpt_output_len: int | None = _as_in_serving("sharegpt_output_len")
    sharegpt_context_len: int = _as_in_serving("sharegpt_context_len")
    gsp_num_groups: int = _as_in_serving("gsp_num_groups")
    gsp_prompts_per_group: int = _as_in_serving("gsp_prompts_per_group")
    gsp_system_prompt_len: int = _as_in_serving("gsp_system_prompt_len")
    gsp_question_len: int = _as_in_serving("gsp_question_len")
    gsp_output_len: int = _as_in_serving("gsp_output_len")
    disable_ignore_eos: bool = _as_in_serving("disable_ignore_eos")

    def dataset(self) -> ServingConfig:
        """The same settings as the makers of datasets take them."""
        named = {each.name for each in dataclasses.fields(self)} & _SERVING_FIELDS.keys()
        return ServingConfig(**{name: getattr(self, name) for name in named})


def parse(config_class: type[ConfigT], argv: Sequence[str]) -> tuple[ConfigT, ServerConfig]:
    """A command line's flags of both kinds. The server logs less unless it is told otherwise."""
    own = field_options(config_class)
    typed = OptionTable([*own, *ALL_OPTIONS]).parse_argv(argv)
    mine: dict[str, Any] = {each.key: typed.pop(each.key) for each in own if each.key in typed}
    return config_class(**mine), ServerConfig.from_typed(_QUIET | typed)


def _check_appendable(path: str) -> None:
    """Found out now, not when there is a result to write."""
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(f"--result-filename {path} cannot be written: {error.strerror}") from None
