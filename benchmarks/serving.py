"""Servers under load, on dummy weights: ours and others, one after the other on one machine.

    python -m benchmarks.serving sgl llama8b poisson --rates 13 20 --num 600 --out results.jsonl
    python -m benchmarks.serving vllm llama8b poisson --rates 13 20 --num 600 --out results.jsonl
    python -m benchmarks.serving sgl llama8b long-prompt --out results.jsonl
    python -m benchmarks.serving sgl llama8b soak --minutes 10 --out results.jsonl

poisson      requests of 64 to 1024 tokens in and 32 to 512 out, at random times
long-prompt  32 streams, without and with a prompt of 16384 tokens that comes while they run
soak         as many such requests as the server takes, for minutes: throughput and memory by minute

Each engine runs with its defaults, prefix cache on. It must be importable here (PYTHONPATH).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import numpy as np

from benchmarks.shapes import SHAPES, write_model, write_tokenizer
from sgl.bench import serving as bench_serving
from sgl.bench.backends import BACKENDS, BodyMaker
from sgl.bench.prompts import Turn
from sgl.bench.servers import Answer, Client

PORT, HOST, READY_TIMEOUT_S = 31777, "127.0.0.1", 240.0
URL = f"http://{HOST}:{PORT}"
CONTEXT_LEN = 20_480
COMMANDS = {
    "sgl": "-m sgl.launch_server --model-path {model} --load-format dummy --dtype bfloat16 "
    "--context-length {context} --host {host} --port {port}",
    "sglang": "-m sglang.launch_server --model-path {model} --load-format dummy --dtype bfloat16 "
    "--context-length {context} --host {host} --port {port}",
    "vllm": "-m vllm.entrypoints.openai.api_server --model {model} --load-format dummy "
    "--dtype bfloat16 --max-model-len {context} --host {host} --port {port}",
}
KINDS = {"sgl": "sgl", "sglang": "sgl", "vllm": "vllm"}  # of client
MIXED = ["--dataset-name", "random", "--random-input-len", "1024", "--random-output-len", "512"]
MIXED += ["--random-range-ratio", "0.0625"]


@contextmanager
def running_server(engine: str, model: Path, extra: Sequence[str], log: TextIO) -> Iterator[None]:
    """A server that answers. It and all its children end with the block."""
    context = min(CONTEXT_LEN, SHAPES[model.name]["max_position_embeddings"])
    words = COMMANDS[engine].format(model=model, context=context, host=HOST, port=PORT).split()
    process = subprocess.Popen(
        [sys.executable, *words, *extra], stdout=log, stderr=log, start_new_session=True
    )
    try:
        asyncio.run(_wait_until_ready(process))
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def _wait_until_ready(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}: see its log")
            with suppress(aiohttp.ClientError):
                async with session.get(f"{URL}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise SystemExit(f"the server is not ready after {READY_TIMEOUT_S:.0f} s: see its log")


def poisson(engine: str, options: argparse.Namespace, out: Path) -> None:
    """The runs, each a line that `sgl bench serving` writes."""
    argv = ["--backend", KINDS[engine], "--base-url", URL, *MIXED, "--output-file", str(out)]
    argv += ["--num-prompts", str(options.num), "--warmup-requests", "32", "--disable-tqdm"]
    bench_serving.run([*argv, "--request-rate", *map(str, options.rates)])


async def long_prompt(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Gaps of the streams in milliseconds, without and with the long prompt."""
    backend = BACKENDS[KINDS[engine]]
    maker = BodyMaker(backend=backend, model=str(options.model_path), extra={})
    rng = random.Random(0)

    def turn(num_in: int, num_out: int) -> Turn:
        vocab_size = SHAPES[options.model]["vocab_size"]
        return Turn([rng.randrange(1000, vocab_size - 300) for _ in range(num_in)], num_out)

    found: dict[str, Any] = {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        client = Client(session, URL, maker)

        async def ask(num_in: int, num_out: int, delay_s: float = 0.0) -> Answer:
            await asyncio.sleep(delay_s)
            prompt = turn(num_in, num_out)
            return await client.ask(prompt.content, prompt)

        await asyncio.gather(*(ask(128, 32) for _ in range(32)), ask(options.prompt_len // 2, 1))
        for name, has_prompt in (("alone", False), ("with prompt", True)) * 2:
            calls = [ask(128, options.output_len) for _ in range(32)]
            late = [ask(options.prompt_len, 1, delay_s=options.delay)] if has_prompt else []
            answers = await asyncio.gather(*calls, *late)
            failed = [answer.error for answer in answers if answer.error]
            if failed:
                raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
            streams = answers[:32]
            begun = max(answer.chunk_times[0] for answer in streams)
            found[name] = _gap_figures(streams, begun, float("inf"))
            if late:
                prompt = answers[-1]
                found[name]["prompt_ttft_ms"] = round(
                    (prompt.chunk_times[0] - prompt.sent_s) * 1e3, 1
                )
                found["while it is computed"] = _gap_figures(
                    streams, prompt.sent_s, prompt.chunk_times[0]
                )
    found["p99_ratio"] = round(found["with prompt"]["p99_ms"] / found["alone"]["p99_ms"], 2)
    return found


def _gap_figures(streams: Sequence[Answer], begin: float, end: float) -> dict[str, float]:
    """Milliseconds between tokens that came after `begin`; they ended by `end` or soon after."""
    gaps = []
    for answer in streams:
        times = np.array(answer.chunk_times)
        is_inside = (times[:-1] >= begin) & (times[:-1] <= end)
        gaps.append(np.diff(times)[is_inside] * 1e3)
    all_gaps = np.concatenate(gaps)
    return {
        "median_ms": round(float(np.median(all_gaps)), 2),
        "p99_ms": round(float(np.percentile(all_gaps, 99)), 2),
        "max_ms": round(float(all_gaps.max()), 2),
    }


def soak(engine: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line a minute: what the clients got, and the memory that is used."""
    for minute in range(options.minutes):
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
            argv = ["--backend", KINDS[engine], "--base-url", URL, *MIXED, "--disable-tqdm"]
            argv += ["--num-prompts", str(options.num), "--seed", str(100 + minute)]
            bench_serving.run([*argv, "--output-file", file.name])
            line = json.loads(Path(file.name).read_text(encoding="utf-8").splitlines()[-1])
        yield {
            "minute": minute,
            "output_throughput": line["output_throughput"],
            "completed": line["completed"],
            "errors": line["errors"],
            "gpu_mib": _gpu_mib(),
        }


def _gpu_mib() -> int | None:
    """Memory in use on the first GPU; None without one."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return int(done.stdout.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=COMMANDS)
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("scenario", choices=["poisson", "long-prompt", "soak"])
    parser.add_argument("--rates", type=float, nargs="+", default=[10.0])
    parser.add_argument("--num", type=int, default=400, help="requests of a run")
    parser.add_argument("--minutes", type=int, default=10, help="soak: runs, about a minute each")
    parser.add_argument("--output-len", type=int, default=1000, help="long-prompt: of a stream")
    parser.add_argument("--prompt-len", type=int, default=16_384, help="long-prompt: of it")
    parser.add_argument("--delay", type=float, default=2.0, help="long-prompt: seconds until it")
    parser.add_argument("--flags", default="", help="for the server, in one word")
    parser.add_argument("--device", default="", help="what it runs on, for the record")
    parser.add_argument("--log", type=Path, default=Path("server.log"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, options.log.open("a", encoding="utf-8") as log:
        options.model_path = write_model(options.model, Path(folder))
        write_tokenizer(options.model_path, SHAPES[options.model]["vocab_size"])
        extra = options.flags.split()
        with running_server(options.engine, options.model_path, extra, log):
            stamp = {"engine": " ".join([options.engine, *extra]), "model": options.model,
                     "device": options.device, "scenario": options.scenario}  # fmt: skip
            if options.scenario == "poisson":
                _write(options.out, stamp)
                poisson(options.engine, options, options.out)
            elif options.scenario == "long-prompt":
                _write(options.out, stamp | asyncio.run(long_prompt(options.engine, options)))
            else:
                for line in soak(options.engine, options):
                    _write(options.out, stamp | line)


def _write(path: Path, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
