"""Write tests/data/smollm2_select.json: what transformers thinks of choices after texts.

    python scripts/make_select_reference.py

Each score is the mean log-probability, in float32, of the tokens that a choice adds to the text or
changes in it; where it adds none, of the text's last token.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sgl.model_files import demo_model_path
from sgl.tokenizer import Tokenizer

PATH = Path(__file__).parent.parent / "tests" / "data" / "smollm2_select.json"
NUM_CASES = 300
WORDS = ["the", "capital", "of", "France", "is", "Paris,", "a", "dog", "runs!", "Über", "naïve"]
WORDS += ["猫が", "🐶", "好き", "x", "=", "3.14;", "\n\n\t", "end"]


def drawn_case(rng: random.Random) -> tuple[str, list[str]]:
    """Choices that begin within the text's last word, empty ones, and some that are the same."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(2, 8)))
    if rng.random() < 0.5:
        text = text[: -rng.randint(1, 2)] or "a"
    ends = [text[-1:] + "s", " " + rng.choice(WORDS), rng.choice(WORDS), "", "🐦 and so", "ing of"]
    return text, rng.sample(ends, rng.randint(1, 5))


def score(model: Any, before: list[int], after: list[int]) -> float:
    pairs = zip(before, after, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
    begin = max(min(same, len(after) - 1), 1)
    with torch.no_grad():
        logits = model(torch.tensor([after])).logits[0].float()
    values = torch.log_softmax(logits, -1)
    rows = [values[i - 1, after[i]].item() for i in range(begin, len(after))]
    return sum(rows) / len(rows) if rows else 0.0


def main() -> None:
    path, rng = Path(demo_model_path()), random.Random(0)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = Tokenizer.load(str(path))  # theirs does not read how a GGUF file splits numbers
    cases = []
    for text, choices in (drawn_case(rng) for _ in range(NUM_CASES)):
        before = tokenizer.encode(text).tolist()
        scores = [score(model, before, tokenizer.encode(text + it).tolist()) for it in choices]
        cases.append({"text": text, "choices": choices, "scores": [round(it, 6) for it in scores]})
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    PATH.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
