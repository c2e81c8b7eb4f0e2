"""`ServingConfig`: the flags of `sgl bench serving`. Names are SGLang's where it has them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sgl.bench.backends import BACKENDS, OTHER_NAMES, Backend
from sgl.errors import ConfigError
from sgl.flags import OptionTable, field_options, flag, from_environment

DEFAULT_NUM_PROMPTS = 1000
GOODPUT_METRICS = ("ttft", "itl", "tpot", "e2e")
DATASETS = ("random", "sharegpt", "generated-shared-prefix", "json", "multi-turn", "file")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """All settings of a run, checked when made (raises ConfigError)."""

    backend: str = flag(
        "kind of the server; openai, unlike the others, sends only fields of OpenAI's API",
        default="sgl",
        choices=tuple(BACKENDS),
        spellings=OTHER_NAMES,
    )
    base_url: str | None = flag(
        "address of the server", default_text="http://HOST:PORT", metavar="URL"
    )
    host: str = flag("its host", default="127.0.0.1")
    port: int | None = flag(
        "its port", default_text="30000; vllm: 8000, lmdeploy: 23333", low=1, high=65535
    )
    model: str | None = flag("model to ask for", default_text="the server's", metavar="NAME")
    tokenizer: str | None = flag(
        "folder, .gguf file or hub id of the tokenizer: for exact lengths of texts, and to count "
        "tokens where the server does not",
        default_text="the server's, if its files are on this machine",
        metavar="MODEL",
    )
    vocab_size: int | None = flag(
        "random ids are below this number",
        default_text="the tokenizer's, else 32000",
        low=1,
    )
    api_key: str | None = flag("key of the server", env="API_KEY", is_secret=True, metavar="KEY")
    ready_timeout: float = flag("seconds to wait for the server", default=60.0, low=0)

    dataset_name: str = flag("what to send", default="random", choices=DATASETS)
    dataset_path: str | None = flag("file of sharegpt or file", metavar="FILE")
    num_prompts: int | None = flag(
        "how many requests to send; for multi-turn, how many conversations",
        default_text=f"{DEFAULT_NUM_PROMPTS}; generated-shared-prefix and file: all",
        low=1,
    )
    seed: int = flag("the same seed gives the same prompts and arrivals", default=1)
    prompt_format: str = flag(
        "send prompts as text or as token ids; auto: ids where prompts are random and the server "
        "takes them",
        default="auto",
        choices=("auto", "ids", "text"),
    )
    apply_chat_template: bool = flag(
        "put each prompt into the tokenizer's chat template first", default=False
    )
    random_input_len: int = flag("random: longest prompt, in tokens", default=1024, low=1)
    random_output_len: int = flag("random: longest answer, in tokens", default=1024, low=1)
    random_range_ratio: float = flag(
        "random: the shortest as a share of the longest; 1 makes all equally long",
        default=0.0,
        low=0,
        high=1,
    )
    sharegpt_output_len: int | None = flag(
        "sharegpt: tokens of each answer", default_text="as in the file", low=1
    )
    sharegpt_context_len: int = flag(
        "sharegpt: leave out what is longer, prompt and answer together", default=2048, low=8
    )
    gsp_num_groups: int = flag("generated-shared-prefix: groups", default=64, low=1)
    gsp_prompts_per_group: int = flag("… prompts in each", default=16, low=1)
    gsp_system_prompt_len: int = flag(
        "… tokens that the prompts of a group share", default=2048, low=1
    )
    gsp_question_len: int = flag("… tokens of its own that each has", default=128, low=1)
    gsp_output_len: int = flag("… tokens of each answer", default=256, low=1)
    multi_turn_num_turns: int = flag("multi-turn: questions in a conversation", default=4, low=1)
    multi_turn_question_len: int = flag("… tokens of a question", default=128, low=1)
    multi_turn_output_len: int = flag("… tokens of an answer", default=128, low=1)
    json_output_len: int = flag("json: most tokens of an answer", default=128, low=1)
    json_schema_mode: str = flag(
        "json: send the schema in the field json_schema, as SGLang has it, or in OpenAI's "
        "response_format; off asks in words alone",
        default="off",
        choices=("off", "json_schema", "response_format"),
    )
    file_output_len: int = flag(
        "file: tokens of an answer where a line says nothing", default=256, low=1
    )

    request_rate: tuple[float, ...] = flag(
        "requests a second, at random times; inf sends all at once; several values: one run each",
        default=(math.inf,),
    )
    burstiness: float = flag(
        "1: a Poisson process; smaller: more bursty, larger: more even",
        default=1.0,
        low=0.001,
    )
    max_concurrency: int | None = flag("most requests at a time", default_text="no limit", low=1)
    warmup_requests: int = flag("requests before the measurement", default=1, low=0)
    flush_cache: bool = flag("have the server forget cached prefixes before a run", default=False)
    disable_stream: bool = flag("ask for whole answers, not for streams", default=False)
    disable_ignore_eos: bool = flag(
        "let answers end where the model ends them, not only at their length", default=False
    )
    extra_request_body: str = flag(
        "JSON object merged into each request", default="{}", metavar="JSON"
    )
    request_timeout: float = flag(
        "give a request up after so many seconds", default=21600.0, low=0.001
    )

    goodput: tuple[str, ...] = flag(
        "limits in ms: count the requests that keep them all; "
        f"metrics: {', '.join(GOODPUT_METRICS)}",
        default=(),
        metavar="METRIC:MS",
    )
    output_file: str | None = flag("append a JSON line for each run", metavar="FILE")
    output_details: bool = flag("… with the times of every request", default=False)
    plot: str | None = flag(
        "draw the distributions; of several request rates, the curves over them",
        metavar="FILE.svg",
    )
    disable_tqdm: bool = flag("no progress bar", default=False)

    def __post_init__(self) -> None:
        for option in field_options(ServingConfig):
            option.check(getattr(self, option.key))
        self._check_server()
        self._check_dataset()
        self._check_format()
        if not self.request_rate or not all(rate > 0 for rate in self.request_rate):
            raise ConfigError(f"--request-rate must be positive, or inf, got {self.request_rate}")
        if self.plot is not None and not self.plot.endswith(".svg"):
            raise ConfigError(f"--plot draws SVG: give a name that ends in .svg, got {self.plot}")
        if self.output_details and self.output_file is None:
            raise ConfigError("--output-details adds to the --output-file: give one")
        goals = self.goals
        if self.disable_stream and set(goals) - {"e2e"}:
            raise ConfigError("--goodput with --disable-stream: only e2e can be measured then")

    @classmethod
    def from_argv(cls, argv: list[str]) -> ServingConfig:
        options = field_options(cls)
        values: dict[str, Any] = from_environment(options, os.environ)
        return cls(**(values | OptionTable(options).parse_argv(argv)))

    @property
    def server(self) -> Backend:
        return BACKENDS[self.backend]

    @property
    def url(self) -> str:
        """Address of the server, without a slash or `/v1` at its end."""
        if self.base_url is None:
            return f"http://{self.host}:{self.port or self.server.port}"
        return self.base_url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def extra_body(self) -> dict[str, Any]:
        try:
            extra = json.loads(self.extra_request_body)
        except ValueError as error:
            raise ConfigError(f"--extra-request-body is not JSON: {error}") from None
        if not isinstance(extra, dict):
            raise ConfigError(f"--extra-request-body must be a JSON object, got {extra!r}")
        return extra

    @property
    def goals(self) -> Mapping[str, float]:
        """Metric -> most milliseconds a good request may take by it."""
        goals = {}
        for text in self.goodput:
            metric, _, limit = text.partition(":")
            try:
                goals[metric] = float(limit)
            except ValueError:
                metric = ""
            if metric not in GOODPUT_METRICS or not goals[metric] > 0:
                raise ConfigError(
                    f"--goodput takes METRIC:MS such as ttft:1000, got {text!r}; the metrics are "
                    f"{', '.join(GOODPUT_METRICS)}"
                )
        return goals

    @property
    def makes_ids(self) -> bool:
        """Whether prompts are sent as token ids."""
        if self.prompt_format != "auto":
            return self.prompt_format == "ids"
        is_random = self.dataset_name in ("random", "generated-shared-prefix")
        return is_random and self.server.takes_ids and not self.apply_chat_template

    def _check_server(self) -> None:
        url = urlsplit(self.url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"--base-url must look like http://HOST:PORT, got {self.base_url}")
        if self.base_url is not None and self.port is not None:
            raise ConfigError("--base-url has the port in it: leave out --port")
        _ = self.extra_body

    def _check_dataset(self) -> None:
        needs_file = self.dataset_name in ("sharegpt", "file")
        if needs_file != (self.dataset_path is not None):
            raise ConfigError(
                f"--dataset-name {self.dataset_name} needs --dataset-path FILE"
                if needs_file
                else f"--dataset-name {self.dataset_name} reads no --dataset-path: leave it out, "
                "or choose sharegpt or file"
            )
        most = self.gsp_num_groups * self.gsp_prompts_per_group
        if self.dataset_name == "generated-shared-prefix" and (self.num_prompts or 0) > most:
            raise ConfigError(
                f"--num-prompts {self.num_prompts}: {self.gsp_num_groups} groups of "
                f"{self.gsp_prompts_per_group} prompts are {most}; raise --gsp-num-groups"
            )
        if self.json_schema_mode != "off" and self.dataset_name != "json":
            raise ConfigError("--json-schema-mode needs --dataset-name json")
        if self.json_schema_mode == "response_format" and self.server.api == "native":
            raise ConfigError(
                "/generate has no response_format: use --json-schema-mode json_schema"
            )

    def _check_format(self) -> None:
        if self.apply_chat_template and self.server.api == "chat":
            raise ConfigError(
                f"--apply-chat-template: with --backend {self.backend} the server does that"
            )
        if self.prompt_format == "ids" and not self.server.takes_ids:
            raise ConfigError(f"--prompt-format ids: --backend {self.backend} takes text only")
        if self.prompt_format == "ids" and self.dataset_name == "multi-turn":
            raise ConfigError(
                "--prompt-format ids: a turn of multi-turn holds the text of the answer before it"
            )


GROUPS = {
    "Server": "backend",
    "Prompts": "dataset_name",
    "Load": "request_rate",
    "Results": "goodput",
}
