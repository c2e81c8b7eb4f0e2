"""How fast a model of the shape of Llama 3.1 8B runs; its weights are random, its speed is not.

Prompts are random ids and no two begin alike, so nothing comes out of the radix cache.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sgl
from benchmarks.shapes import SHAPES, write_model
from scripts.gpu_steps.findings import parser


@dataclass(frozen=True)
class Load:
    """How many tokens in and out, and how often each is measured."""

    num_in: int = 128
    num_out: int = 128
    batch: int = 64
    long_prompt: int = 8192
    rounds: int = 3


SMALL_LOAD = Load(num_in=32, num_out=16, batch=8, long_prompt=1024, rounds=2)


@dataclass
class Trial:
    """An engine and the figures taken from it."""

    engine: sgl.Engine
    vocab_size: int
    load: Load
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return [
            [self.random.randrange(3, self.vocab_size) for _ in range(length)] for _ in range(count)
        ]

    def generate(self, prompts: list[list[int]], num_out: int) -> float:
        """Seconds until all have all their tokens."""
        sampling = {"temperature": 0.0, "max_new_tokens": num_out, "ignore_eos": True}
        started = time.perf_counter()
        outputs = self.engine.generate(input_ids=prompts, sampling_params=sampling)
        seconds = time.perf_counter() - started
        for output in outputs:
            assert len(output["output_ids"]) == num_out, output["meta_info"]["finish_reason"]
        return seconds

    def decode_rate(self, batch: int) -> dict[str, float]:
        """Tokens a second: in all, and of the decode steps alone."""
        prompts = [self.prompts(batch, self.load.num_in) for _ in range(2)]
        num_out = self.load.num_out
        first, whole = self.generate(prompts[0], 1), self.generate(prompts[1], num_out)
        return {
            "tok_s": batch * num_out / whole,
            "decode_tok_s": batch * (num_out - 1) / (whole - first),
            "first_token_s": first,
        }

    def long_prefill(self) -> dict[str, float]:
        seconds = self.generate(self.prompts(1, self.load.long_prompt), 1)
        return {"s": seconds, "tok_s": self.load.long_prompt / seconds}

    def median(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Of every figure, over the rounds."""
        rounds = [measure() for _ in range(self.load.rounds)]
        return {
            name: float(f"{statistics.median(one[name] for one in rounds):.4g}")
            for name in rounds[0]
        }


def main() -> None:
    arguments = parser().parse_args()
    shape, load = ("tiny", SMALL_LOAD) if arguments.quick else ("llama8b", Load())
    with tempfile.TemporaryDirectory(prefix="llama-8b-") as folder:
        path = write_model(shape, Path(folder))
        started = time.perf_counter()
        with sgl.Engine(
            model_path=str(path),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            device=arguments.device,
            random_seed=0,
            log_level="info",
        ) as engine:
            arguments.found.add("start", None, s=round(time.perf_counter() - started, 1))
            measure(engine, SHAPES[shape]["vocab_size"], load, arguments)


def measure(engine: sgl.Engine, vocab_size: int, load: Load, arguments: Any) -> None:
    found, trial = arguments.found, Trial(engine, vocab_size, load)
    num_tokens = engine.get_server_info()["max_total_num_tokens"]
    found.add("KV pool", num_tokens > 0, tokens=num_tokens)
    for batch in (1, load.batch):  # kernels and libraries are loaded at their first use
        trial.generate(trial.prompts(batch, load.num_in), 4)
    for batch in (1, load.batch):
        rates = trial.median(lambda batch=batch: trial.decode_rate(batch))
        found.add(f"{batch} x {load.num_in} in, {load.num_out} out", True, **rates)
    trial.long_prefill()
    found.add(f"prefill of {load.long_prompt}", True, **trial.median(trial.long_prefill))
    if arguments.device == "cuda":
        found.add("GPU memory in use", None, mib=_used_mib())


def _used_mib() -> int:
    """Of the first GPU, as the driver counts it: the caching allocator gives nothing back."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
