"""`sgl bench offline-throughput`: many requests at once, and how fast an engine answers them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from sgl.bench.datasets import make_conversations
from sgl.bench.prompts import Turn, Writer
from sgl.config import ServerConfig
from sgl.engine import Engine
from sgl.model_files import resolve_model_path, resolve_tokenizer_path
from sgl.offline.runs import (
    answer_ids,
    device_of,
    profiled,
    random_batch,
    running,
    vocab_size,
    write_result,
)
from sgl.offline.settings import ThroughputConfig, parse
from sgl.tokenizer import Tokenizer

WARM_UP = {"num_prompts": 16, "input_len": 64}
WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Throughput:
    """What was done in `seconds`. Of the input tokens, `num_cached` were found in the cache."""

    seconds: float
    num_requests: int
    num_input: int
    num_output: int
    num_cached: int

    @classmethod
    def of(cls, seconds: float, answers: Sequence[Mapping[str, Any]]) -> Throughput:
        metas = [answer["meta_info"] for answer in answers]
        return cls(
            seconds,
            len(metas),
            num_input=sum(meta["prompt_tokens"] for meta in metas),
            num_output=sum(meta["completion_tokens"] for meta in metas),
            num_cached=sum(meta["cached_tokens"] for meta in metas),
        )

    def values(self) -> dict[str, float]:
        """Seconds, and amounts a second, by SGLang's names."""
        return {
            "successful_requests": self.num_requests,
            "total_latency": self.seconds,
            "total_input_tokens": self.num_input,
            "total_output_tokens": self.num_output,
            "request_throughput": self.num_requests / self.seconds,
            "input_throughput": self.num_input / self.seconds,
            "output_throughput": self.num_output / self.seconds,
            "total_throughput": (self.num_input + self.num_output) / self.seconds,
            "cached_share": self.num_cached / self.num_input,
        }

    def table(self) -> str:
        found = self.values()
        rows = (
            ("requests", self.num_requests, f"{found['request_throughput']:.2f}"),
            ("input tokens", self.num_input, f"{found['input_throughput']:.0f}"),
            ("output tokens", self.num_output, f"{found['output_throughput']:.0f}"),
            ("tokens", self.num_input + self.num_output, f"{found['total_throughput']:.0f}"),
        )
        lines = [f"{name:16}{number:>12}{rate:>12} a second" for name, number, rate in rows]
        lines.append(f"{'seconds':16}{self.seconds:12.2f}")
        lines.append(f"{'cached':16}{found['cached_share']:>12.1%}   of the input tokens")
        return "\n".join(lines)


def run(argv: list[str]) -> int:
    """The command."""
    config, server = parse(ThroughputConfig, argv)
    turns = requests(config, server)
    with running(server) as engine:
        warm_up(engine, vocab_size(server))
        print(f"Answering {len(turns)} requests …", file=sys.stderr)
        with profiled(engine, config) if config.profile else nullcontext():
            result = answer(engine, turns, ignores_eos=not config.disable_ignore_eos)
    write_result(config, server, {"dataset_name": config.dataset_name, **result.values()})
    print(f"{server.model_name} on {device_of(server)}, --tp {server.tp_size}\n\n{result.table()}")
    return 0


def requests(config: ThroughputConfig, server: ServerConfig) -> list[Turn]:
    """The dataset's prompts, as text or ids, with the lengths of their answers."""
    dataset = config.dataset()
    tokenizer = None
    if not server.skip_tokenizer_init:
        path = resolve_tokenizer_path(server, resolve_model_path(server))
        tokenizer = Tokenizer.load(path)
    writer = Writer(config.seed, tokenizer, vocab_size(server), as_ids=dataset.makes_ids)
    return [turn for conversation in make_conversations(dataset, writer) for turn in conversation]


def warm_up(engine: Engine, num_ids: int) -> None:
    """Compile and load what steps of many requests need, and leave nothing in the cache."""
    writer = Writer(0, None, num_ids, as_ids=True)
    answer_ids(engine, random_batch(writer, **WARM_UP), WARM_UP_TOKENS)
    engine.flush_cache()


def answer(engine: Engine, turns: Sequence[Turn], *, ignores_eos: bool) -> Throughput:
    """Answer everything at once."""
    sampling = [
        {"temperature": 0.0, "max_new_tokens": turn.output_len, "ignore_eos": ignores_eos}
        for turn in turns
    ]
    texts = [turn.content for turn in turns if isinstance(turn.content, str)]
    ids = [turn.content for turn in turns if not isinstance(turn.content, str)]
    begin = time.perf_counter()  # a dataset has either texts or ids
    answers = engine.generate(texts or None, sampling, input_ids=ids or None)
    return Throughput.of(time.perf_counter() - begin, answers)
