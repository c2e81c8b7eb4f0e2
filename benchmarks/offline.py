"""Speed without HTTP on this machine's CPU: `sgl.Engine` beside `transformers`, in one run.

    python -m benchmarks.offline [--rounds 5] [--out benchmarks/results/offline_cpu.jsonl] [case …]

Cases run in rounds, the engines taking turns, so that a slow minute of the machine hits all alike;
reported are medians and their ratios. Same work: token ids from one seed, greedy, no end of
sequence. Needs the demo model (`make install`), `pip install accelerate`, and some minutes.

    decode    one request, 16 in, 64 out                    tokens a second
    prefill   one request, 512 in, 1 out                    tokens a second
    lengths   40 requests of 32 to 512 in, 1 out, one by one    seconds
    batch     32 requests, 128 in, 128 out                  output tokens a second
    prefix    1024 tokens once, then 32 x (32 own in, 16 out)   seconds
    no_reuse  32 requests, 128 in, 32 out, nothing in common    seconds, with and without the cache
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import sgl
from sgl.model_files import demo_model_path

VOCAB = range(1000, 40000)
NUM_THREADS = len(os.sched_getaffinity(0))


@dataclass
class Samples:
    """Seconds of each engine in one case, round by round."""

    unit: str
    amount: float  # what is done in those seconds; 0: the seconds themselves are the figure
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def figure(self, engine: str) -> float:
        median = statistics.median(self.seconds[engine])
        return self.amount / median if self.amount else median


class Ours:
    """The engine in its own processes."""

    def __init__(self, **flags: Any) -> None:
        self.engine = sgl.Engine(dtype="bfloat16", **flags)

    def run(self, prompts: list[list[int]], num_new: int) -> float:
        sampling = {"temperature": 0, "max_new_tokens": num_new, "ignore_eos": True}
        started = time.perf_counter()
        answers = self.engine.generate(input_ids=prompts, sampling_params=sampling)
        seconds = time.perf_counter() - started
        assert all(len(answer["output_ids"]) == num_new for answer in answers)
        return seconds

    def flush(self) -> None:
        while not self.engine.flush_cache():
            time.sleep(0.01)


class Reference:
    """`transformers` with a static batch, in this process."""

    def __init__(self) -> None:
        torch.set_num_threads(NUM_THREADS)
        path = Path(demo_model_path())
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),  # packed is slower
        ).eval()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], num_new: int) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_new,
            max_new_tokens=num_new,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - started
        assert out.shape[1] == ids.shape[1] + num_new
        return seconds

    def flush(self) -> None:
        """It keeps nothing between calls."""


class Bench:
    """The engines, started when a case first needs them."""

    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds
        self.rng = random.Random(0)
        self._engines: dict[str, Ours | Reference] = {}

    def engine(self, name: str) -> Ours | Reference:
        if name not in self._engines:
            make: dict[str, Callable[[], Ours | Reference]] = {
                "sgl": Ours,
                "sgl without cache": lambda: Ours(disable_radix_cache=True),
                "transformers": Reference,
            }
            self._engines[name] = make[name]()
        return self._engines[name]

    def prompt(self, length: int) -> list[int]:
        return self.rng.choices(VOCAB, k=length)

    def take_turns(
        self,
        names: list[str],
        make_prompts: Callable[[], list[list[int]]],
        num_new: int,
        samples: Samples,
        num_rounds: int | None = None,
        *,
        one_by_one: bool = False,
    ) -> Samples:
        """Rounds of all engines on the same fresh prompts; one round before is not counted."""
        for number in range(-1, num_rounds or self.num_rounds):
            prompts = make_prompts()
            calls = [[prompt] for prompt in prompts] if one_by_one else [prompts]
            for name in names if number % 2 else reversed(names):
                engine = self.engine(name)
                engine.flush()
                seconds = sum(engine.run(call, num_new) for call in calls)
                print(f"    {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
                if number >= 0:
                    samples.seconds.setdefault(name, []).append(seconds)
        return samples

    def decode(self) -> Samples:
        """Seconds of 63 tokens: the time to the first one is measured and taken away."""
        both = ["sgl", "transformers"]
        one = self.take_turns(both, lambda: [self.prompt(16)], 1, Samples("", 0))
        whole = self.take_turns(both, lambda: [self.prompt(16)], 65, Samples("tokens/s", 64))
        for name in both:
            first = statistics.median(one.seconds[name])
            whole.seconds[name] = [seconds - first for seconds in whole.seconds[name]]
        return whole

    def prefill(self) -> Samples:
        both = ["sgl", "transformers"]
        return self.take_turns(both, lambda: [self.prompt(512)], 1, Samples("tokens/s", 512))

    def lengths(self) -> Samples:
        def prompts() -> list[list[int]]:
            return [self.prompt(self.rng.randint(32, 512)) for _ in range(40)]

        both = ["sgl", "transformers"]
        return self.take_turns(both, prompts, 1, Samples("s", 0), one_by_one=True)

    def batch(self) -> Samples:
        def prompts() -> list[list[int]]:
            return [self.prompt(128) for _ in range(32)]

        samples = Samples("output tokens/s", 32 * 128)
        return self.take_turns(["sgl", "transformers"], prompts, 128, samples)

    def prefix(self) -> Samples:
        def prompts() -> list[list[int]]:
            shared = self.prompt(1024)
            return [shared + self.prompt(32) for _ in range(32)]

        return self.take_turns(["sgl", "sgl without cache"], prompts, 16, Samples("s", 0))

    def no_reuse(self) -> Samples:
        def prompts() -> list[list[int]]:
            return [self.prompt(128) for _ in range(32)]

        names = ["sgl", "sgl without cache"]
        return self.take_turns(names, prompts, 32, Samples("s", 0), 2 * self.num_rounds)


CASES = {
    "decode": Bench.decode,
    "prefill": Bench.prefill,
    "lengths": Bench.lengths,
    "batch": Bench.batch,
    "prefix": Bench.prefix,
    "no_reuse": Bench.no_reuse,
}


def report(case: str, samples: Samples) -> dict[str, Any]:
    """One line of the results: medians, all rounds, and our figure over the other's."""
    ours = "sgl"
    [other] = samples.seconds.keys() - {ours}
    ratio = statistics.median(samples.seconds[other]) / statistics.median(samples.seconds[ours])
    return {
        "case": case,
        "unit": samples.unit,
        "median": {name: round(samples.figure(name), 3) for name in samples.seconds},
        "speedup": round(ratio, 3),
        "over": other,
        "seconds": {name: [round(s, 3) for s in all_] for name, all_ in samples.seconds.items()},
    }


def environment() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": f"{NUM_THREADS} cores of {_cpu_name()}",
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sgl": sgl.__version__,
        "model": "SmolLM2-135M-Instruct",
        "dtype": "bfloat16",
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none is given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    bench = Bench(options.rounds)
    lines = [environment()]
    print(json.dumps(lines[0]))
    for case in options.cases or CASES:
        lines.append(report(case, CASES[case](bench)))
        print(json.dumps(lines[-1]), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
