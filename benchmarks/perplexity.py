"""What a number format of the KV cache costs in quality: perplexity of this project's documents.

    python -m benchmarks.perplexity [--model MODEL] [--device cpu] [--out results.jsonl]

The documents are cut into pieces of 512 tokens; every token but a piece's first counts. A piece is
computed in chunks, so that later tokens read the cache.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import sgl

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("docs/architecture.md", "docs/request_walk.md", "docs/performance.md", "README.md")
PIECE, CHUNK = 512, 64
FORMATS = ("auto", "fp8_e5m2", "fp8_e4m3")


def perplexity(flags: dict[str, Any], texts: list[str]) -> tuple[float, int]:
    """Perplexity, and the number of tokens that counted."""
    with sgl.Engine(chunked_prefill_size=CHUNK, disable_radix_cache=True, **flags) as engine:
        answers = engine.generate(
            texts,
            {"max_new_tokens": 0},
            return_logprob=True,
            logprob_start_len=0,
        )
    values = [
        entry[0]
        for answer in answers
        for entry in answer["meta_info"]["input_token_logprobs"]
        if entry[0] is not None
    ]
    return math.exp(-sum(values) / len(values)), len(values)


def pieces() -> list[str]:
    """About `PIECE` tokens each, at four characters a token."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    size = 4 * PIECE
    return [text[i : i + size] for i in range(0, len(text) - size, size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    texts, first = pieces()[: options.pieces], 0.0
    for name in FORMATS:
        flags = {"model_path": options.model, "device": options.device, "kv_cache_dtype": name}
        value, num_tokens = perplexity(flags, texts)
        first = first or value
        line = {"kv_cache_dtype": name, "perplexity": round(value, 4), "tokens": num_tokens,
                "to_auto": round(value / first, 4)}  # fmt: skip
        print(json.dumps(line), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
