"""Random models of a true architecture, through `sgl.Engine` in every mode, against transformers.

transformers: make, save, generate greedily ──▶ ids and how clear each choice was
engines, one a mode, over the saved folder  ──▶ the same ids
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import sgl
from scripts.gpu_steps.findings import Findings, parser

EOS_ID, VOCAB = 256, 320
TIE = 1e-4  # two logits so close may change places when the order of a sum changes
LOGPROB_TOLERANCE = 1e-3
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
FABLE = (
    "A hare one day ridiculed the short feet and slow pace of the tortoise, who replied, laughing: "
    "Though you be swift as the wind, I will beat you in a race. "
)
PROMPTS = [
    "a",
    "The capital of France is",
    "Ein Igel trifft am Abend einen Fuchs — und grüßt. 🦔",
    FABLE + "The hare",
    FABLE + "The hare believed",
    FABLE + "The tortoise",
    FABLE + FABLE,
    "0123456789" * 9,
    "x" * 33,
    "def f(x):\n    return",
]
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks of 16": {"chunked_prefill_size": 16},
    "no radix cache": {"disable_radix_cache": True},
    "pages of 16": {"page_size": 16},
    "small pool": {"max_total_tokens": 480, "schedule_conservativeness": 0.0},
    "bfloat16": {"dtype": "bfloat16", "disable_radix_cache": True},
}


@dataclass(frozen=True)
class Answer:
    """What transformers gives: ids, by how much each beat the next best, log-probabilities."""

    prompt_ids: list[int]
    output_ids: list[int]
    gaps: list[float]
    logprobs: list[float]


def main() -> None:
    options = parser()
    options.add_argument("--family", choices=("llama", "qwen2"), required=True)
    arguments = options.parse_args()
    num_new = 12 if arguments.quick else 32
    with tempfile.TemporaryDirectory(prefix="tiny-model-") as scratch:
        folder = Path(scratch)
        model = make_model(arguments.family, folder).to(arguments.device)
        tokenizer = make_tokenizer(folder)
        answers = [answer(model, tokenizer.encode(text).ids, num_new) for text in PROMPTS]
        found: Findings = arguments.found
        found.add("transformers", None, clearest_tie=min(min(it.gaps) for it in answers))
        del model
        trial = Trial(folder, arguments.device, answers, tokenizer, num_new, found)
        with ThreadPoolExecutor(1 if arguments.device == "cpu" else len(MODES)) as pool:
            for future in [pool.submit(trial.run, mode) for mode in MODES]:
                future.result()


def make_model(family: str, folder: Path) -> torch.nn.Module:
    """A random model in `folder`, its biases random too."""
    torch.manual_seed(0)
    model: Any
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA_3))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, use_sliding_window=False))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    return model.eval()


def make_tokenizer(folder: Path) -> Tokenizer:
    """A token for every byte, and the end of sequence."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    assert tokenizer.token_to_id("<end>") == EOS_ID
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', encoding="utf-8")
    return tokenizer


@torch.inference_mode()
def answer(model: Any, prompt_ids: list[int], num_new: int) -> Answer:
    """Greedy, in float32, one prompt alone; the end of sequence is a token like any other."""
    inputs = torch.tensor([prompt_ids], device=model.device)
    model.generation_config.eos_token_id = None
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=num_new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(out.logits).float()
    best, second = logits.topk(2).values.T
    output_ids = out.sequences[0, len(prompt_ids) :]
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, output_ids.unsqueeze(1)).squeeze(1)
    return Answer(prompt_ids, output_ids.tolist(), (best - second).tolist(), logprobs.tolist())


@dataclass(frozen=True)
class Trial:
    """One model, asked in every mode."""

    folder: Path
    device: str
    answers: list[Answer]
    tokenizer: Tokenizer
    num_new: int
    found: Findings

    def run(self, mode: str) -> None:
        """Start an engine, ask it, say what was found; a failure of one mode is a line, too."""
        flags = {"dtype": "float32", "max_total_tokens": 8192} | MODES[mode]
        started = time.monotonic()
        try:
            with sgl.Engine(
                model_path=str(self.folder), device=self.device, random_seed=0, **flags
            ) as engine:
                self.found.add(f"{mode}: start", None, s=round(time.monotonic() - started, 1))
                self._checks(mode)(mode, engine)
        except (sgl.errors.SglError, AssertionError) as error:
            self.found.add(f"{mode}: engine", False, why=f"{type(error).__name__}: {error}"[-800:])

    def _checks(self, mode: str) -> Callable[[str, sgl.Engine], None]:
        match mode:
            case "plain":
                return self._check_plain
            case "bfloat16":
                return self._check_bfloat16
            case "small pool":
                return self._check_small_pool
            case _:
                return self._check_together

    def _check_plain(self, mode: str, engine: sgl.Engine) -> None:
        """One by one; all at once; again, from the radix cache; with random draws."""
        alone = [self._ask(engine, text) for text in PROMPTS]
        self._compare(f"{mode}: one by one", alone)
        self._compare(f"{mode}: all at once", self._ask(engine, PROMPTS))
        again = self._ask(engine, PROMPTS)
        self._compare(f"{mode}: second time", again)
        num_cached = sum(output["meta_info"]["cached_tokens"] for output in again)
        num_asked = sum(output["meta_info"]["prompt_tokens"] for output in again)
        self.found.add(
            f"{mode}: radix", num_cached > num_asked // 2, cached=num_cached, asked=num_asked
        )
        self._check_texts(mode, again)
        self._check_logprobs(mode, engine)
        self._check_draws(mode, engine)

    def _check_together(self, mode: str, engine: sgl.Engine) -> None:
        self._compare(f"{mode}: all at once", self._ask(engine, PROMPTS))
        self._compare(f"{mode}: second time", self._ask(engine, PROMPTS))

    def _check_small_pool(self, mode: str, engine: sgl.Engine) -> None:
        self._check_together(mode, engine)
        num = engine.get_server_info()["num_retractions"]
        self.found.add(f"{mode}: requests were retracted", num > 0, retractions=num)

    def _check_bfloat16(self, mode: str, engine: sgl.Engine) -> None:
        """One by one, so that every repetition has steps of the same shape."""
        first, second = (
            [self._ask(engine, text, return_logprob=True) for text in PROMPTS] for _ in range(2)
        )
        self.found.add(f"{mode}: repeats itself", _ids(first) == _ids(second))
        values = [
            row[0] for output in first for row in output["meta_info"]["output_token_logprobs"]
        ]
        self.found.add(f"{mode}: finite", all(map(math.isfinite, values)), least=min(values))
        num_same = sum(map(_num_equal, _ids(first), [it.output_ids for it in self.answers]))
        self.found.add(f"{mode}: tokens as in float32", None, same=num_same, of=len(values))

    def _check_texts(self, mode: str, outputs: list[dict[str, Any]]) -> None:
        texts = [self.tokenizer.decode(output["output_ids"]) for output in outputs]
        self.found.add(f"{mode}: texts", [output["text"] for output in outputs] == texts)

    def _check_logprobs(self, mode: str, engine: sgl.Engine) -> None:
        outputs = self._ask(engine, PROMPTS, return_logprob=True, top_logprobs_num=2)
        error = max(
            abs(row[0] - wanted)
            for output, answer in zip(outputs, self.answers, strict=True)
            if output["output_ids"] == answer.output_ids
            for row, wanted in zip(
                output["meta_info"]["output_token_logprobs"], answer.logprobs, strict=True
            )
        )
        self.found.add(f"{mode}: log-probabilities", error < LOGPROB_TOLERANCE, max_error=error)

    def _check_draws(self, mode: str, engine: sgl.Engine) -> None:
        """A seed's draws are its own: alone, in company and beside greedy requests."""
        draws = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
        alone = [self._ask(engine, text, draws) for text in PROMPTS[:4]]
        mixed = [draws if index < 4 else {} for index in range(len(PROMPTS))]
        together = self._ask(engine, PROMPTS, mixed)
        same = _ids(alone) == _ids(together[:4])
        changed = _ids(alone) != [it.output_ids for it in self.answers[:4]]
        self.found.add(f"{mode}: seeded draws repeat", same and changed)

    def _ask(self, engine: sgl.Engine, prompt: Any, sampling: Any = None, **fields: Any) -> Any:
        base = {"temperature": 0.0, "max_new_tokens": self.num_new, "ignore_eos": True}
        base["skip_special_tokens"] = True
        if isinstance(sampling, list):
            return engine.generate(prompt, [base | one for one in sampling], **fields)
        return engine.generate(prompt, base | (sampling or {}), **fields)

    def _compare(self, check: str, outputs: list[dict[str, Any]]) -> None:
        """With the ids of transformers; where the model was undecided, answers may part."""
        wrong, ties = [], 0
        for output, wanted in zip(outputs, self.answers, strict=True):
            ids = output["output_ids"]
            where = _num_equal(ids, wanted.output_ids)
            if ids == wanted.output_ids:
                continue
            is_tie = where < len(ids) == len(wanted.output_ids) and wanted.gaps[where] < TIE
            ties += is_tie
            if not is_tie:
                wrong.append(f"{ids} at {where} of {wanted.output_ids}")
        self.found.add(check, not wrong, answers=len(outputs), ties=ties, wrong=wrong[:2])


def _ids(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [output["output_ids"] for output in outputs]


def _num_equal(ours: list[int], theirs: list[int]) -> int:
    """How many tokens from the start on are the same."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


if __name__ == "__main__":
    main()
