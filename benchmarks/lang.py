"""What the language itself costs, on a backend that answers at once.

    taskset -c 0 python -m benchmarks.lang [--num 2000] [--rounds 5] [--out FILE]

adds    programs of two roles and two answers, whose bodies only add
reads   programs whose bodies wait for the first answer before they ask for the second

Programs a second of one `run_batch`, the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import sgl
from benchmarks.offline import environment
from sgl.lang.backends.base import Backend
from sgl.lang.ir import Sampling
from sgl.lang.prompt import Answer, Prompt


class AtOnce(Backend):
    async def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        return Answer("x")


@sgl.function
def adds(s: Any, question: str) -> None:
    s += sgl.user(question) + sgl.assistant(sgl.gen("first"))
    s += sgl.user("more") + sgl.assistant(sgl.gen("second"))


@sgl.function
def reads(s: Any, question: str) -> Any:
    s += question + sgl.gen("first")
    s += s["first"] + sgl.gen("second")
    return s["second"]


def programs_per_s(program: Any, num: int) -> float:
    questions = [{"question": "hello"}] * num
    begun = time.perf_counter()
    states = program.run_batch(questions, backend=AtOnce())
    seconds = time.perf_counter() - begun
    assert all(state["second"] == "x" for state in states)
    return num / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    known = {key: environment()[key] for key in ("device", "commit", "python")}
    lines = []
    for program in (adds, reads):
        found = [programs_per_s(program, options.num) for _ in range(options.rounds)]
        rates = [round(rate) for rate in found]
        line = {"programs": program.__name__, "num": options.num, "rates": rates}
        lines.append(known | line | {"programs_per_s": round(statistics.median(found))})
        print(json.dumps(lines[-1]), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
