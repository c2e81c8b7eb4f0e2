"""SmolLM2 in process, in every way to run a step: its answers, and how near its logits are.

    the CPU, float32 and bfloat16   ──▶ log-probabilities of eight texts: reference and floor
    float32: triton, torch          ──▶ answers to the forty prompts, and log-probabilities
    bfloat16: triton, torch, flashinfer                           ──▶ log-probabilities

triton runs with and without graphs, each with and without overlap; torch, which records no steps,
with and without overlap; flashinfer, which has no float32, with both, with graphs alone and with
overlap alone. Fifteen starts on the GPU, several at a time. SmolLM2's three KV heads do not divide
by two: of TP=2, tests/gpu/test_tensor_parallel.py has the answers of a model whose heads do.

A log-probability is a logit less the logarithm of a sum that its neighbours share: where no logit
differs by more than d, none differs by more than 2 d. Prompts whose log-probabilities are asked for
are computed without graphs, so every text is asked twice: for those of an answer, whose steps are
recorded ones where there are graphs (flashinfer's: without the prompt), and for the prompt's.

Logits are float32 sums of hidden states that bfloat16 rounds to eight bits in every layer, so two
right implementations differ by as much as their sums round differently. What that comes to is the
floor: bfloat16 against float32, both on this CPU. Against the CPU's bfloat16, and against the GPU's
first one (triton), a difference above the bar is a failure only where the floor is below it, else
no more than a figure. What is judged always: float32 is within the bar, and bfloat16 is not much
further from the CPU's float32 than the CPU's own bfloat16 is.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reference
import torch

import sgl
from scripts.gpu_steps.closeness import BAR, Distance, Position, Sequences, positions
from scripts.gpu_steps.findings import Findings, parser
from scripts.gpu_steps.smollm2 import model_file
from scripts.gpu_steps.smollm2_ways import EXACT, ROUNDED, Way, ways_of
from sgl.execution.attention.choice import make_backend
from sgl.execution.kv_cache import KvCache
from sgl.models.batch import AttentionSpec

LEAST_EQUAL = 38 / 40  # of the answers
NUM_TEXTS = 8
TEXT_LENS = (60, 120)  # fewest and most tokens
NUM_NEW = 16
NAMED_IDS = list(range(0, 49152, 192))  # all over the vocabulary
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 5, "token_ids_logprob": NAMED_IDS}
NUM_AT_A_TIME = 4  # engines that share a GPU; the most of a start is not the GPU's work
HEADS = AttentionSpec(num_heads=9, num_kv_heads=3, head_dim=64, scale=0.125)  # of SmolLM2-135M


@dataclass(frozen=True)
class Asked:
    """What one engine said: to the prompts, and of each text twice."""

    start_s: float
    outputs: list[dict[str, Any]]
    texts: list[list[Position]]


@dataclass
class Matrix:
    """Asks engines the same and compares what they say.

    known  what others are compared with, by name: what the CPU says of the texts, in float32 and in
           bfloat16, and the first way of the device in bfloat16
    """

    model: str
    device: str
    answers: dict[str, reference.Answer]
    texts: list[list[int]]
    found: Findings
    known: dict[str, Sequences] = field(default_factory=dict)

    def run(self) -> None:
        heard = dict(self._heard([EXACT, ROUNDED], {}))
        if len(heard) < 2:
            return
        self.known = {"CPU fp32": heard[EXACT].texts, "CPU bf16": heard[ROUNDED].texts}
        floor = Distance.between(self.known["CPU bf16"], self.known["CPU fp32"])
        self.found.add("floor: CPU bf16 to CPU fp32", None, bar=BAR, **floor.figures())
        backends = ("triton", "torch") if self.device == "cuda" else ("torch",)
        for way, asked in self._heard(ways_of(self.device, "float32", *backends), self.answers):
            self._count_equal(way, asked.outputs)
            distance = Distance.between(asked.texts, self.known["CPU fp32"])
            self.found.add(f"{way.name}: CPU fp32", distance.is_close(), **distance.figures())
        self._compare_rounded(ways_of(self.device, "bfloat16", *backends), floor)
        if self.device == "cuda" and self._has_flashinfer():
            self._compare_rounded(ways_of(self.device, "bfloat16", "flashinfer"), floor)

    def _compare_rounded(self, ways: Sequence[Way], floor: Distance) -> None:
        for way, asked in self._heard(ways, {}):
            for name, texts in self.known.items():
                distance = Distance.between(asked.texts, texts)
                is_exact = name == "CPU fp32"
                ok = distance.is_like(floor) if is_exact else distance.is_close(floor)
                figures = distance.figures() | {"floor": floor.figures()["max_abs"]}
                self.found.add(f"{way.name}: {name}", ok, **figures)
            self.known.setdefault("first bf16", asked.texts)

    def _count_equal(self, way: Way, outputs: Sequence[dict[str, Any]]) -> None:
        """Answers to all prompts, asked at once."""
        num_equal, ties, wrong = 0, [], []
        for (name, answer), output in zip(self.answers.items(), outputs, strict=True):
            if answer.agrees(output):
                num_equal += 1
            elif answer.parts_at_tie(output["output_ids"], reference.TIE):
                ties.append(name)
            else:
                wrong.append(name)
        least = math.ceil(LEAST_EQUAL * len(outputs))
        figures = {"equal": num_equal, "of": len(outputs), "least": least}
        ok = num_equal >= least
        self.found.add(f"{way.name}: answers", ok, **figures, ties=ties, wrong=wrong)

    def _has_flashinfer(self) -> bool:
        """Compiles its kernels, so that several engines need not; without it they run on triton."""
        from sgl.execution.attention.flashinfer_attention import FlashinferAttention

        started = time.monotonic()
        cache = KvCache([HEADS], 64, 1, dtype=torch.bfloat16, device=torch.device("cuda", 0))
        is_there = isinstance(make_backend("flashinfer", [HEADS], cache), FlashinferAttention)
        seconds = round(time.monotonic() - started, 1)
        self.found.add("bf16 flashinfer", None, can_be_used=is_there, s=seconds)
        return is_there

    def _heard(
        self, ways: Sequence[Way], answers: dict[str, reference.Answer]
    ) -> Iterator[tuple[Way, Asked]]:
        """Those that could be asked, in their order; a failure is a finding."""
        with ThreadPoolExecutor(1 if self.device == "cpu" else NUM_AT_A_TIME) as pool:
            pending = [(way, pool.submit(self._ask, way, answers)) for way in ways]
            for way, future in pending:
                try:
                    asked = future.result()
                except (sgl.errors.SglError, AssertionError) as error:
                    why = f"{type(error).__name__}: {error}"[-800:]
                    self.found.add(f"{way.name}: engine", False, why=why)
                else:
                    self.found.add(f"{way.name}: start", None, s=asked.start_s)
                    yield way, asked

    def _ask(self, way: Way, answers: dict[str, reference.Answer]) -> Asked:
        started = time.monotonic()
        with sgl.Engine(model_path=self.model, random_seed=0, **way.flags) as engine:
            start_s = round(time.monotonic() - started, 1)
            prompts = [answer.prompt_ids for answer in answers.values()]
            outputs = _generate(engine, prompts, reference.NUM_ANSWER_TOKENS) if prompts else []
            begun = _generate(engine, self.texts, NUM_NEW, **LOGPROBS)
            read = _generate(engine, self.texts, 1, **LOGPROBS, logprob_start_len=0)
        return Asked(start_s, outputs, [positions(output) for output in begun + read])


def _generate(
    engine: sgl.Engine, prompts: list[list[int]], num_new: int, **fields: Any
) -> list[dict[str, Any]]:
    """Greedily, all at once."""
    sampling = {"temperature": 0.0, "max_new_tokens": num_new}
    return engine.generate(input_ids=prompts, sampling_params=sampling, **fields)


def main() -> None:
    options = parser()
    options.add_argument("--model", type=Path, nargs="+")
    arguments = options.parse_args()
    found: Findings = arguments.found
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        model = model_file(arguments.model, Path(scratch))
        if model is None:
            found.add("model", None, why="none given with --model, none installed")
            return
        known = reference.Reference.load()
        digest = hashlib.sha256(Path(model).read_bytes()).hexdigest()
        found.add("model of the reference", digest == known.sha256, sha256=digest[:16])
        num_prompts, num_texts = (4, 2) if arguments.quick else (None, NUM_TEXTS)
        answers = dict(list(known.answers.items())[:num_prompts])
        texts = some_texts(list(known.answers.values()), num_texts)
        Matrix(model, arguments.device, answers, texts, found).run()


def some_texts(answers: Sequence[reference.Answer], count: int) -> list[list[int]]:
    """Prompts with their answers, of all kinds, cut to a length of TEXT_LENS."""
    least, most = TEXT_LENS
    whole = [answer.prompt_ids + answer.output_ids for answer in answers]
    whole = [ids[:most] for ids in whole if len(ids) >= least]
    return whole[:: len(whole) // count][:count]


if __name__ == "__main__":
    main()
