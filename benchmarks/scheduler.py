"""What a decode step costs the scheduler's CPU, without a worker and without other processes.

    python -m benchmarks.scheduler [--batch 64 256 1024] [--steps 300] [--out FILE]

plan     the batcher's plan, and its bytes
commit   a result's bytes, what its requests gained, and the bytes of that

Microseconds a step, the median of 5 runs; nothing ends and nothing arrives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import msgspec

from benchmarks.offline import environment
from sgl.messages import Generate, NewTokens, StepResult, pack
from sgl.sampling_params import SamplingParams
from sgl.scheduling.batcher import Batcher
from sgl.scheduling.kv_store import KvStore
from sgl.scheduling.limits import Limits

NUM_IN = 128
NUM_RUNS = 5
PARTS = ("plan", "commit")


def decode_steps(batch: int, num_steps: int) -> dict[str, float]:
    """Microseconds of each part of a step in which `batch` requests decode."""
    num_pages = batch * (NUM_IN + num_steps + 8)
    limits = Limits(
        max_step_tokens=2**20,
        min_prompt_tokens=2**20,
        max_rows=batch,
        max_total_len=2**20,
        max_in_flight=2,
    )
    batcher = Batcher(KvStore(num_pages, 1), limits)
    for number in range(batch):
        prompt = pack(range(number, number + NUM_IN))
        sampling = SamplingParams(max_new_tokens=num_steps + 4, ignore_eos=True)
        batcher.add(Generate(number, prompt, sampling))
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(StepResult)
    seconds = dict.fromkeys(PARTS, 0.0)
    batcher.plan()
    for number in range(num_steps):
        result = encoder.encode(StepResult(number, pack(range(batch))))
        begun = time.perf_counter()
        encoder.encode(batcher.plan())
        planned = time.perf_counter()
        encoder.encode(NewTokens(batcher.commit(decoder.decode(result))))
        ended = time.perf_counter()
        seconds["plan"] += planned - begun
        seconds["commit"] += ended - planned
    return {part: value / num_steps * 1e6 for part, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    known = {key: environment()[key] for key in ("device", "commit", "python")}
    lines = []
    for batch in options.batch:
        runs = [decode_steps(batch, options.steps) for _ in range(NUM_RUNS)]
        medians = {part: round(statistics.median(run[part] for run in runs), 1) for part in PARTS}
        lines.append(known | {"batch": batch, "us_a_step": medians})
        print(json.dumps(lines[-1]), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
