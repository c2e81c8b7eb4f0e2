"""Servers under load, on dummy weights: ours and others, one after the other on one machine.

    python -m benchmarks.serving sgl llama8b poisson --rates 13 20 --num 600 --out results.jsonl
    python -m benchmarks.serving vllm llama8b poisson --rates 13 20 --num 600 --out results.jsonl
    python -m benchmarks.serving sgl llama8b long-prompt --out results.jsonl
    python -m benchmarks.serving sgl llama8b soak --minutes 10 --out results.jsonl

poisson      requests of 64 to 1024 tokens in and 32 to 512 out, at random times
long-prompt  32 streams, without and with a prompt of 16384 tokens that comes while they run
soak         such requests without a pause, for minutes: what each minute brought, and memory

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
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
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
def running_server(engine: str, model: Path, extra: Sequence[str], log: TextIO) -> Iterator[int]:
    """The process id of a server that answers. It and all its children end with the block."""
    context = min(CONTEXT_LEN, SHAPES[model.name]["max_position_embeddings"])
    words = COMMANDS[engine].format(model=model, context=context, host=HOST, port=PORT).split()
    process = subprocess.Popen(
        [sys.executable, *words, *extra], stdout=log, stderr=log, start_new_session=True
    )
    try:
        asyncio.run(_wait_until_ready(process))
        yield process.pid
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
    rng = random.Random(0)
    found: dict[str, Any] = {}
    async with _connected(engine, options) as client:

        async def ask(num_in: int, num_out: int, delay_s: float = 0.0) -> Answer:
            await asyncio.sleep(delay_s)
            prompt = _turn(rng, options, num_in, num_out)
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


async def soak(engine: str, options: argparse.Namespace, pid: int) -> list[dict[str, Any]]:
    """For each minute: tokens a second that came, requests that ended, and memory at its end.

    As many users as `--users` send their next request when the last is answered, so that the
    server never lacks work. What comes after the last minute is not counted.
    """
    begin = time.perf_counter()
    edges = begin + 60.0 * np.arange(options.minutes + 1)
    tokens = np.zeros(options.minutes)
    ended = np.zeros(options.minutes, dtype=int)
    errors: list[str] = []

    async def user(number: int) -> None:
        rng = random.Random(number)
        while time.perf_counter() < edges[-1]:
            turn = _turn(rng, options, rng.randint(64, 1024), rng.randint(32, 512))
            answer = await client.ask(turn.content, turn)
            times = answer.chunk_times
            if answer.error:
                errors.append(answer.error)
                await asyncio.sleep(1.0)
            elif times:
                counts, _ = np.histogram(times, edges)
                tokens[:] += counts * ((answer.num_output or 0) / len(times))
                ended[:] += np.histogram([answer.end_s], edges)[0]

    async def watch() -> list[dict[str, Any]]:
        memory = []
        for minute, edge in enumerate(edges[1:]):
            await asyncio.sleep(edge - time.perf_counter())
            used = await asyncio.to_thread(_gpu_mib)
            memory.append({"gpu_mib": used, "server_mib": _server_mib(pid), "errors": len(errors)})
            print(f"minute {minute} ends: {memory[-1]}", flush=True)
        return memory

    async with _connected(engine, options) as client:
        users = asyncio.gather(*(user(number) for number in range(options.users)))
        memory = await watch()
        await users
    for text in sorted(set(errors)):
        print(f"{errors.count(text)} x {text}", flush=True)
    rates = np.round(tokens / 60.0, 1).tolist()
    return [
        {"minute": minute, "output_throughput": rate, "ended": int(num), **used}
        for minute, (rate, num, used) in enumerate(zip(rates, ended, memory, strict=True))
    ]


@asynccontextmanager
async def _connected(engine: str, options: argparse.Namespace) -> AsyncIterator[Client]:
    maker = BodyMaker(backend=BACKENDS[KINDS[engine]], model=str(options.model_path), extra={})
    # a request may wait for its turn and run for minutes
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Client(session, URL, maker)


def _turn(rng: random.Random, options: argparse.Namespace, num_in: int, num_out: int) -> Turn:
    vocab_size = SHAPES[options.model]["vocab_size"]
    return Turn([rng.randrange(1000, vocab_size - 300) for _ in range(num_in)], num_out)


def _server_mib(pid: int) -> int:
    """Memory of their own (not shared, not files) that the server's processes hold."""
    num_pages = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            session = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[3]
            if int(session) == pid:
                _, resident, shared, *_ = (folder / "statm").read_text(encoding="utf-8").split()
                num_pages += int(resident) - int(shared)
    return num_pages * os.sysconf("SC_PAGE_SIZE") >> 20


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
    parser.add_argument("--minutes", type=int, default=10, help="soak: how long")
    parser.add_argument("--users", type=int, default=512, help="soak: requests at a time")
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
        with running_server(options.engine, options.model_path, extra, log) as pid:
            stamp = {"engine": " ".join([options.engine, *extra]), "model": options.model,
                     "device": options.device, "scenario": options.scenario}  # fmt: skip
            if options.scenario == "poisson":
                _write(options.out, stamp)
                poisson(options.engine, options, options.out)
            elif options.scenario == "long-prompt":
                _write(options.out, stamp | asyncio.run(long_prompt(options.engine, options)))
            else:
                for line in asyncio.run(soak(options.engine, options, pid)):
                    _write(options.out, stamp | line)


def _write(path: Path, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
