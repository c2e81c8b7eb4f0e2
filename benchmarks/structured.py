"""What answers under a grammar cost, beside free ones, and what jump-forward saves.

    python -m benchmarks.structured [--batch 32] [--rounds 5] [--out FILE] [case …]
    python -m benchmarks.structured --shape llama8b --output-len 256 --device "NVIDIA H200" \\
        --flags '{"tokenizer_path": "…"}' throughput

    throughput  output tokens a second of a batch that is all constrained, by each of some grammars,
                over one that is all free, just before and after, without jump-forward
    jump        the character JSON of the tests for --batch prompts: steps and seconds with and
                without jump-forward, and how many greedy answers are the same

`--shape` runs dummy weights; grammars need a tokenizer, whose vocabulary may be smaller. `--flags`
are the engine's.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sgl
from benchmarks.offline import environment
from benchmarks.shapes import SHAPES, write_model
from benchmarks.workloads import CHARACTER

NUM_IN = 8  # what is measured is decoding
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "skills": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "skills"],
}
GRAMMARS = {  # none of them is at its end within an answer
    "words": {"regex": r"[a-z ,.]{10000}"},
    "line": {"regex": r"[^\n]{10000}"},
    "json": {"json_schema": json.dumps({"type": "array", "items": ITEM, "minItems": 100})},
}
Line = dict[str, Any]


def seconds_of(engine: sgl.Engine, prompts: list[list[int]], sampling: dict[str, Any]) -> float:
    started = time.perf_counter()
    answers = engine.generate(input_ids=prompts, sampling_params=sampling)
    seconds = time.perf_counter() - started
    assert all(len(answer["output_ids"]) == sampling["max_new_tokens"] for answer in answers)
    return seconds


def throughput(options: argparse.Namespace) -> Line:
    batch, num_out = options.batch, options.output_len
    rng = random.Random(0)
    free = {"max_new_tokens": num_out, "ignore_eos": True, "temperature": 0}
    seconds: dict[str, list[float]] = {"free": []} | {name: [] for name in GRAMMARS}
    ratios: dict[str, list[float]] = {name: [] for name in GRAMMARS}
    with sgl.Engine(disable_jump_forward=True, **options.flags) as engine:

        def measure(name: str) -> float:
            prompts = [rng.choices(range(1000, 40000), k=NUM_IN) for _ in range(batch)]
            while not engine.flush_cache():
                time.sleep(0.01)
            took = seconds_of(engine, prompts, free | GRAMMARS.get(name, {}))
            print(f"    {name}: {took:.3f} s", file=sys.stderr, flush=True)
            seconds[name].append(took)
            return took

        for name in seconds:  # which compiles the grammars, and is not counted
            measure(name)
            seconds[name].clear()
        before = measure("free")
        for _ in range(options.rounds):
            for name in GRAMMARS:
                took, after = measure(name), measure("free")
                ratios[name].append((before + after) / 2 / took)
                before = after
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "case": "throughput",
        "batch": batch,
        "output_len": num_out,
        "tokens_per_s": {name: round(batch * num_out / s, 1) for name, s in medians.items()},
        "over_free": {name: round(statistics.median(found), 3) for name, found in ratios.items()},
        "ratios": {name: [round(ratio, 3) for ratio in found] for name, found in ratios.items()},
        "seconds": {name: [round(s, 3) for s in values] for name, values in seconds.items()},
    }


def jump(options: argparse.Namespace) -> Line:
    batch = options.batch
    prompts = [f"Character sheet number {number}:\n" for number in range(batch)]
    sampling = {"temperature": 0, "max_new_tokens": 256, "regex": CHARACTER}
    ways = {"jump": {}, "token by token": {"disable_jump_forward": True}}
    found: dict[str, Line] = {}
    texts: dict[str, list[str]] = {}
    for name, more in ways.items():
        with sgl.Engine(random_seed=0, **options.flags, **more) as engine:
            engine.generate(prompts[0], sampling)
            seconds, steps = [], 0
            for _ in range(options.rounds):
                while not engine.flush_cache():
                    time.sleep(0.01)
                before, started = engine.get_server_info()["num_steps"], time.perf_counter()
                answers = engine.generate(prompts, sampling)
                seconds.append(time.perf_counter() - started)
                steps = int(engine.get_server_info()["num_steps"] - before)
            texts[name] = [answer["text"] for answer in answers]
            assert all(re.fullmatch(CHARACTER, text) for text in texts[name])
            found[name] = {"steps": steps, "seconds": round(statistics.median(seconds), 3)}
    pairs = zip(*texts.values(), strict=True)
    return {
        "case": "jump",
        "batch": batch,
        "ways": found,
        "fewer_steps": round(1 - found["jump"]["steps"] / found["token by token"]["steps"], 3),
        "faster": round(found["token by token"]["seconds"] / found["jump"]["seconds"], 2),
        "same_answers": sum(one == other for one, other in pairs),
    }


CASES = {"throughput": throughput, "jump": jump}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none is given")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-len", type=int, default=64, help="tokens, for throughput")
    parser.add_argument("--flags", type=json.loads, default={}, help="JSON")
    parser.add_argument("--shape", choices=SHAPES, help="dummy weights instead of the demo model")
    parser.add_argument("--device", help="what it runs on, for the record")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    lines = [environment() | {"flags": options.flags}]
    if options.device:
        lines[0]["device"] = options.device
    with TemporaryDirectory() as folder:
        if options.shape:
            lines[0]["model"] = options.shape
            path = str(write_model(options.shape, Path(folder)))
            options.flags = options.flags | {"model_path": path, "load_format": "dummy"}
        print(json.dumps(lines[0]))
        for case in options.cases or CASES:
            lines.append(CASES[case](options))
            print(json.dumps(lines[-1]), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
