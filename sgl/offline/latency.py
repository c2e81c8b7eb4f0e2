"""`sgl bench latency`: how long one batch takes, step by step.

    caller     begin                                                             end
    scheduler    │    prefill … result │ decode result │ decode result │ …  result │
                 └───── prefill ───────┴─── step ──────┴─── step ──────┘

The scheduler notes when the result of each step arrives (the server's --trace-steps): a short line
of a file for each, so every step is seen and none is slowed down by being watched. Nothing is
streamed: with large batches that would measure how fast text is handed out.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sgl.bench.prompts import Writer
from sgl.config import ServerConfig
from sgl.engine import Engine
from sgl.errors import ConfigError
from sgl.hardware import num_usable_cores
from sgl.offline.runs import (
    answer_ids,
    device_of,
    profiled,
    random_batch,
    running,
    vocab_size,
    write_result,
)
from sgl.offline.settings import LatencyConfig, parse

WARM_UP_TOKENS = 8
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "1, 1, 2, 3, 5, 8,",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Requests of a batch, and tokens of each prompt and each answer."""

    batch_size: int
    input_len: int
    output_len: int

    @property
    def num_tokens(self) -> int:
        return self.batch_size * (self.input_len + self.output_len)


@dataclass(frozen=True, slots=True)
class Latency:
    """What a batch took, in seconds.

    prefill  until the last of the batch had its first token
    steps    each decode step of the whole batch
    total    until the caller had the answers
    """

    shape: Shape
    prefill: float
    steps: tuple[float, ...]
    total: float

    @classmethod
    def of(cls, shape: Shape, begin: float, end: float, trace: Sequence[dict[str, Any]]) -> Latency:
        """`trace`: the batch's lines of --trace-steps; `begin` and `end` by the same clock."""
        last_prefill = max(
            index for index, step in enumerate(trace) if step["num_prefill_tokens"] > 0
        )
        steps = tuple(
            step["arrived"] - before["arrived"]
            for before, step in itertools.pairwise(trace[last_prefill:])
            if step["num_rows"] == shape.batch_size
        )
        return cls(shape, trace[last_prefill]["arrived"] - begin, steps, end - begin)

    def values(self) -> dict[str, float | None]:
        """Seconds and tokens a second, by SGLang's names; None where there was no decode step."""
        shape = self.shape
        median = statistics.median(self.steps) if self.steps else None
        return {
            "batch_size": shape.batch_size,
            "input_len": shape.input_len,
            "output_len": shape.output_len,
            "prefill_latency": self.prefill,
            "prefill_throughput": shape.batch_size * shape.input_len / self.prefill,
            "median_decode_latency": median,
            "p99_decode_latency": float(np.percentile(self.steps, 99)) if self.steps else None,
            "median_decode_throughput": shape.batch_size / median if median else None,
            "total_latency": self.total,
            "overall_throughput": shape.num_tokens / self.total,
        }


def run(argv: list[str]) -> int:
    """The command."""
    config, server = parse(LatencyConfig, argv)
    if config.correctness_test:
        return show_answers(config, server)
    shapes = [
        Shape(*lens)
        for lens in itertools.product(config.batch_size, config.input_len, config.output_len)
    ]
    with tempfile.TemporaryDirectory() as folder:
        server = _measurable(server, max(config.batch_size), f"{folder}/steps.jsonl")
        with running(server) as engine:
            _check_room(engine, shapes)
            results = list(measure(engine, config, server, shapes))
    print(f"{server.model_name} on {device_of(server)}, --tp {server.tp_size}\n\n{table(results)}")
    return 0


def measure(
    engine: Engine, config: LatencyConfig, server: ServerConfig, shapes: Sequence[Shape]
) -> Iterator[Latency]:
    """Each shape once, after a short run that compiles and loads what it needs."""
    assert server.trace_steps is not None
    writer = Writer(config.seed, None, vocab_size(server), as_ids=True)
    with open(server.trace_steps, "rb") as trace:
        for shape in shapes:
            prompts = random_batch(writer, shape.batch_size, shape.input_len)
            answer_ids(engine, prompts, min(shape.output_len, WARM_UP_TOKENS))
            engine.flush_cache()
            trace.read()
            begin = time.monotonic()
            answer_ids(engine, prompts, shape.output_len)
            end = time.monotonic()
            result = Latency.of(shape, begin, end, [json.loads(line) for line in trace])
            write_result(config, server, result.values())
            yield result
            if config.profile:
                engine.flush_cache()
                with profiled(engine, config):
                    answer_ids(engine, prompts, shape.output_len)


def table(results: Sequence[Latency]) -> str:
    """All results, and what the columns mean."""
    lines = [
        f"{'':22} │ {'prefill':^19} │ {'decode: one step':^29} │ {'whole batch':>15}",
        f"{'batch':>6}{'input':>8}{'output':>8} │ {'ms':>9}{'tokens/s':>10} │ "
        f"{'median ms':>10}{'p99 ms':>9}{'tokens/s':>10} │ {'s':>9}{'tokens/s':>10}",
    ]
    for result in results:
        shape, found = result.shape, result.values()
        lines.append(
            f"{shape.batch_size:6}{shape.input_len:8}{shape.output_len:8} │ "
            f"{_ms(found['prefill_latency']):>9}{found['prefill_throughput']:10.0f} │ "
            f"{_ms(found['median_decode_latency']):>10}{_ms(found['p99_decode_latency']):>9}"
            f"{_number(found['median_decode_throughput']):>10} │ "
            f"{found['total_latency']:9.3f}{found['overall_throughput']:10.0f}"
        )
    return "\n".join([*lines, "", *_LEGEND])


_LEGEND = (
    "prefill      until every prompt of the batch has its first token; prompt tokens a second",
    "decode       steps that give each of the batch one more token; output tokens a second",
    "whole batch  as the caller sees it; prompt and output tokens a second",
)


def show_answers(config: LatencyConfig, server: ServerConfig) -> int:
    """--correctness-test: greedy answers, to be read by somebody."""
    if server.skip_tokenizer_init:
        raise ConfigError("--correctness-test prints text: leave out --skip-tokenizer-init")
    sampling = {"temperature": 0.0, "max_new_tokens": max(config.output_len)}
    with running(server) as engine:
        answers = engine.generate(PROMPTS, sampling)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"=== {prompt}\n{prompt}{answer['text']}\nids: {answer['output_ids']}\n")
    return 0


def _measurable(server: ServerConfig, batch_size: int, trace: str) -> ServerConfig:
    """Only ids go in and out; a whole batch may run; steps are noted."""
    limits = server.limits_on(device_of(server), num_cores=num_usable_cores())
    if server.max_running_requests is not None and batch_size > server.max_running_requests:
        raise ConfigError(
            f"--batch-size {batch_size} is more than --max-running-requests "
            f"{server.max_running_requests}: raise the one or lower the other"
        )
    return replace(
        server,
        skip_tokenizer_init=True,
        chat_template=None,
        max_running_requests=max(batch_size, limits.max_running_requests),
        trace_steps=server.trace_steps or trace,
    )


def _check_room(engine: Engine, shapes: Sequence[Shape]) -> None:
    room = engine.get_server_info()["max_total_num_tokens"]
    for shape in shapes:
        if shape.num_tokens > room:
            raise ConfigError(
                f"--batch-size {shape.batch_size} with {shape.input_len} + {shape.output_len} "
                f"tokens needs a KV cache of {shape.num_tokens} tokens, there is room for {room}: "
                "choose less, or raise --max-total-tokens or --mem-fraction-static"
            )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
