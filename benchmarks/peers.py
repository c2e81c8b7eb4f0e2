"""One engine's offline speed on dummy weights; run it for each engine in turn on one machine.

    python -m benchmarks.peers sgl llama8b --out results.jsonl [--workloads w3 w4 w1 w2]
    python -m benchmarks.peers vllm llama8b --out results.jsonl
    python -m benchmarks.peers --compare results.jsonl

Token ids in, no tokenizer, greedy, no end of sequence, prefix cache on, each engine's defaults.
Every engine must be importable where it is measured (PYTHONPATH). Only ratios between engines of
one machine and one hour mean anything: alternate, several processes each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from benchmarks import workloads
from benchmarks.shapes import SHAPES, weight_bytes, write_model
from benchmarks.workloads import Work

MEMORY_FRACTION, CONTEXT_LEN = 0.88, 4096


class Peer(Protocol):
    version: str

    def generate(self, work: Work) -> list[int]:
        """Answer everything at once; returns how many tokens each answer has."""
        ...


class Sgl:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import sgl

        self.version = sgl.__version__
        self.engine = sgl.Engine(
            model_path=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            context_length=CONTEXT_LEN,
            mem_fraction_static=MEMORY_FRACTION,
            log_level="info",
            random_seed=0,
            **options,
        )

    def generate(self, work: Work) -> list[int]:
        sampling = _sampling(work)
        answers = self.engine.generate(input_ids=work.prompts, sampling_params=sampling)
        return [len(answer["output_ids"]) for answer in answers]


class Vllm:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm

        self.version = vllm.__version__
        self.sampling_params = vllm.SamplingParams
        self.engine = vllm.LLM(
            model=model,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=CONTEXT_LEN,
            gpu_memory_utilization=MEMORY_FRACTION,
            seed=0,
            **options,
        )

    def generate(self, work: Work) -> list[int]:
        sampling = [
            self.sampling_params(temperature=0.0, max_tokens=num, ignore_eos=True, detokenize=False)
            for num in work.output_lens
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts]
        answers = self.engine.generate(prompts, sampling, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]


class Sglang:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import sglang

        self.version = sglang.__version__
        self.engine = sglang.Engine(
            model_path=model,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            context_length=CONTEXT_LEN,
            mem_fraction_static=MEMORY_FRACTION,
            log_level="warning",
            random_seed=0,
            **options,
        )

    def generate(self, work: Work) -> list[int]:
        sampling = _sampling(work)
        answers = self.engine.generate(input_ids=work.prompts, sampling_params=sampling)
        return [answer["meta_info"]["completion_tokens"] for answer in answers]


def _sampling(work: Work) -> list[dict[str, Any]]:
    """What both speakers of SGLang's parameters are told."""
    return [
        {"temperature": 0.0, "max_new_tokens": num, "ignore_eos": True} for num in work.output_lens
    ]


ENGINES = {"sgl": Sgl, "vllm": Vllm, "sglang": Sglang}
SMALLER_IS_BETTER = {"ms_per_token", "ms_per_step", "wall_s", "start_s"}


def seconds_of(peer: Peer, work: Work) -> float:
    started = time.perf_counter()
    num_tokens = peer.generate(work)
    seconds = time.perf_counter() - started
    assert num_tokens == work.output_lens, "an answer has the wrong length"
    return seconds


def throughput(peer: Peer, work: Work) -> dict[str, float]:
    seconds = seconds_of(peer, work)
    return {
        "wall_s": seconds,
        "output_tok_s": work.num_output / seconds,
        "total_tok_s": (work.num_input + work.num_output) / seconds,
    }


def one_request(peer: Peer, gbs: float, model: str) -> dict[str, float]:
    first, whole = (
        statistics.median(
            seconds_of(peer, workloads.equal(seed + k, 1, 128, num_out)) for k in range(5)
        )
        for seed, num_out in ((300, 1), (400, 256))
    )
    ms = (whole - first) / 255 * 1e3
    found = {"ms_per_token": ms, "first_token_ms": first * 1e3}
    if gbs:
        found |= {"copy_gbs": gbs, "roofline_share": weight_bytes(model) / gbs / 1e6 / ms}
    return found


def many_requests(peer: Peer, repeats: int) -> dict[str, float]:
    first, whole = (
        statistics.median(
            seconds_of(peer, workloads.equal(seed + k, 64, 128, num_out))
            for k in range(repeats + 1)
        )
        for seed, num_out in ((500, 1), (600, 256))
    )
    return {
        "ms_per_step": (whole - first) / 255 * 1e3,
        "decode_tok_s": 64 * 255 / (whole - first),
        "output_tok_s": 64 * 256 / whole,
    }


def measure(peer: Peer, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line per result; each workload has run once, smaller, before it is timed."""
    for name in options.workloads:
        match name:
            case "w1":
                peer.generate(workloads.mixed(9101, 128))
                for run in range(options.repeats):
                    yield {"workload": name, **throughput(peer, workloads.mixed(1 + 10 * run))}
            case "w2":
                peer.generate(workloads.shared_prefixes(9102, 4))
                for run in range(options.repeats):
                    work = workloads.shared_prefixes(2 + 10 * run)
                    yield {"workload": name, **throughput(peer, work)}
            case "w3":
                peer.generate(workloads.equal(9103, 1, 128, 64))
                yield {"workload": name, **one_request(peer, options.copy_gbs, options.model)}
            case "w4":
                peer.generate(workloads.equal(9104, 64, 128, 32))
                yield {"workload": name, **many_requests(peer, options.repeats)}
            case _:
                raise SystemExit(f"no workload {name}")


def compare(path: Path) -> None:
    """Medians of every figure, and ours over the best of the others (above 1: we are faster).

    Engines with options are shown apart and not compared.
    """
    figures: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        for key in ("ms_per_token", "roofline_share", "ms_per_step", "wall_s", "start_s"):
            if key in line:
                figures[line["model"], line["workload"], key][line["engine"]].append(line[key])
    for (model, workload, key), by_engine in sorted(figures.items()):
        medians = {name: statistics.median(values) for name, values in by_engine.items()}
        text = ", ".join(f"{name} {value:.4g}" for name, value in sorted(medians.items()))
        others = [medians[name] for name in ("sglang", "vllm") if name in medians]
        if others and "sgl" in medians and key in SMALLER_IS_BETTER:
            text += f"   -> {min(others) / medians['sgl']:.3f}x"
        print(f"{model:9}{workload:6}{key:16}{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", nargs="?", choices=ENGINES)
    parser.add_argument("model", nargs="?", choices=SHAPES)
    parser.add_argument("--workloads", nargs="+", default=["w3", "w4", "w1", "w2"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--copy-gbs", type=float, default=0.0, help="measured copy bandwidth")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, for the engine")
    parser.add_argument("--device", default="", help="what it runs on, for the record")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path)
    options = parser.parse_args()
    if options.compare:
        compare(options.compare)
        return
    if not (options.engine and options.model):
        parser.error("name an engine and a model")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        peer = ENGINES[options.engine](
            str(write_model(options.model, Path(folder))), options.options
        )
        stamp = {
            "engine": " ".join([options.engine, *map("=".join, _texts(options.options))]),
            "version": peer.version,
            "model": options.model,
            "device": options.device,
            "python": platform.python_version(),
        }
        start = {"workload": "start", "start_s": time.perf_counter() - started}
        for found in chain([start], measure(peer, options)):
            line = json.dumps(stamp | _rounded(found))
            print(line, flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


def _texts(options: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in sorted(options.items())]


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}


if __name__ == "__main__":
    main()
