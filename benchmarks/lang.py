"""What the language costs, and what programs written in it save.

    taskset -c 0 python -m benchmarks.lang [--num 2000] [--rounds 5] [--out FILE] overhead
    python -m benchmarks.lang [--rounds 3] [--out FILE] reuse by-hand

overhead  on a backend that answers at once, programs a second of one `run_batch`: `adds`, of two
          roles and two answers, whose bodies only add; `reads`, whose bodies wait for the first
          answer before they ask for the second
reuse     SmolLM2: the share of prompt tokens that the server had computed already, over the largest
          share that the prompts allow, for a tree of thought (branching 3, depth 4), a chat of
          8 turns, 200 questions after 5 examples, and a ReAct loop
by-hand   seconds of the tree and of the questions, over those of the same written with the `openai`
          client: one request after the other, and on 32 threads; by turns, each after a flush
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sgl
from benchmarks.offline import environment
from sgl.lang.backends.base import Backend
from sgl.lang.backends.native import Fields
from sgl.lang.backends.runtime_endpoint import RuntimeEndpoint
from sgl.lang.ir import Sampling
from sgl.lang.prompt import Answer, Prompt

THREADS = 32
BRANCHING, DEPTH, STEP_TOKENS = 3, 4, 16
PROBLEM = "A farmer has 17 sheep. All but 9 run away. How many are left? Think in small steps."
STEP = "Propose step {}."
SHOTS = "".join(
    f"Question: {question}\nAnswer: {answer}\n\n"
    for question, answer in [
        ("Which planet is known as the red planet, and why is it called that?", "Mars."),
        ("What do bees collect from flowers to make honey in their hives?", "Nectar."),
        ("Who wrote the play about two young lovers in the city of Verona?", "Shakespeare."),
        ("What is the chemical symbol of the metal that wedding rings are made of?", "Au."),
        ("How many legs does a spider have, if it has lost none of them?", "Eight."),
    ]
)
COUNTRIES = [
    "France",
    "Italy",
    "Japan",
    "Peru",
    "Kenya",
    "Norway",
    "Egypt",
    "Chile",
    "Cuba",
    "Fiji",
]
ASPECTS = ["capital", "language", "currency", "highest mountain", "largest city", "longest river"]
ASPECTS += ["anthem", "flag", "neighbour", "continent", "climate", "main export", "best known dish"]
ASPECTS += ["national animal", "oldest town", "largest lake", "president", "population", "coast"]
ASPECTS += ["time zone"]
QUESTIONS = [f"What is the {aspect} of {land}?" for land in COUNTRIES for aspect in ASPECTS]
QA_TOKENS = 8
TURNS = ["Hello!", "Who are you?", "Tell me a fact.", "Another one.", "Why?", "Are you sure?"]
TURNS += ["Thank you.", "Goodbye."]
Line = dict[str, Any]


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


@sgl.function
def tree_of_thought(s: Any) -> None:
    s += sgl.user(PROBLEM)
    level = [s]
    for _ in range(DEPTH):
        level = [branch for parent in level for branch in _branches(parent)]
    for leaf in level:
        leaf.sync()


def _branches(s: Any) -> Any:
    branches = s.fork(BRANCHING)
    branches += lambda i: (
        sgl.user(STEP.format(i + 1)) + sgl.assistant(sgl.gen("step", max_tokens=STEP_TOKENS))
    )
    return branches


@sgl.function
def few_shot_qa(s: Any, question: str) -> None:
    s += SHOTS + "Question: " + question + "\nAnswer:"
    s += sgl.gen("answer", max_tokens=QA_TOKENS, stop="\n")


@sgl.function
def chat(s: Any) -> None:
    for turn in TURNS:
        s += sgl.user(turn) + sgl.assistant(sgl.gen("said", max_tokens=24))


@sgl.function
def react(s: Any, question: str) -> None:
    s += "Answer a question by thinking, searching and reading.\n" + SHOTS
    s += f"Question: {question}\n"
    for step in range(4):
        s += f"Thought {step}:" + sgl.gen("thought", max_tokens=24, stop="\n")
        s += f"\nAction {step}: " + sgl.select("action", ["Search", "Look up", "Finish"])
        s += f"\nObservation {step}: Nothing was found about it.\n"
    s += "Answer:" + sgl.gen("answer", max_tokens=8, stop="\n")


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "tree of thought": lambda backend: tree_of_thought.run(backend=backend, temperature=0).sync(),
    "8-turn chat": lambda backend: chat.run(backend=backend, temperature=0).sync(),
    "5-shot QA": lambda backend: few_shot_qa.run_batch(
        [{"question": question} for question in QUESTIONS], backend=backend, temperature=0
    ),
    "ReAct": lambda backend: react.run_batch(
        [{"question": question} for question in QUESTIONS[::20]], backend=backend, temperature=0
    ),
}


class Recorded(RuntimeEndpoint):
    """
    requests  tokens of the prompt, tokens of the answer, and how many of the former were cached
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.requests: list[tuple[list[int], list[int], int]] = []

    async def ask(self, fields: Fields) -> Any:
        answers = await super().ask(fields)
        many = answers if isinstance(answers, list) else [answers]
        prompts = fields.get("input_ids") or [one["meta_info"]["prompt_token_ids"] for one in many]
        for prompt, one in zip(prompts, many, strict=True):
            cached = one["meta_info"]["cached_tokens"]
            self.requests.append((list(prompt), list(one["output_ids"]), cached))
        return answers


def ideal_cached(requests: Sequence[tuple[list[int], list[int], int]]) -> int:
    """Prompt tokens that need not be computed, if each prefix is computed once.

    Tokens of answers are computed as they are generated, all but the last. The last token of a
    prompt is always computed: from it the answer begins.
    """
    tree: dict[int, Any] = {}
    computed = 0
    for prompt, answer, _ in sorted(requests, key=lambda one: len(one[0])):
        node = tree
        for place, token in enumerate([*prompt, *answer[:-1]]):
            if token not in node:
                node[token] = {}
                computed += place < len(prompt)
            elif place == len(prompt) - 1:
                computed += 1
            node = node[token]
    return sum(len(prompt) for prompt, _, _ in requests) - computed


def overhead(options: argparse.Namespace) -> Iterator[Line]:
    for program in (adds, reads):
        rates = []
        for _ in range(options.rounds):
            begun = time.perf_counter()
            states = program.run_batch([{"question": "hello"}] * options.num, backend=AtOnce())
            rates.append(round(options.num / (time.perf_counter() - begun)))
            assert all(state["second"] == "x" for state in states)
        line = {"programs": program.__name__, "num": options.num, "rates": rates}
        yield line | {"programs_per_s": round(statistics.median(rates))}


def reuse(options: argparse.Namespace) -> Iterator[Line]:
    with sgl.Runtime() as runtime:
        for name, run in PROGRAMS.items():
            _flush(runtime)
            backend = Recorded(runtime.url)
            run(backend)
            num_prompt = sum(len(prompt) for prompt, _, _ in backend.requests)
            cached = sum(cached for _, _, cached in backend.requests)
            ideal = ideal_cached(backend.requests)
            yield {
                "reuse": name,
                "requests": len(backend.requests),
                "prompt_tokens": num_prompt,
                "cached_share": round(cached / num_prompt, 4),
                "ideal_share": round(ideal / num_prompt, 4),
                "of_ideal": round(cached / ideal, 4),
            }


def by_hand(options: argparse.Namespace) -> Iterator[Line]:
    import openai

    with sgl.Runtime() as runtime:
        client = openai.OpenAI(base_url=runtime.url + "/v1", api_key="none")

        def ask(messages: list[Any]) -> list[Any]:
            reply = client.chat.completions.create(
                model="default", messages=messages, max_tokens=STEP_TOKENS, temperature=0
            )
            said = reply.choices[0].message.content
            return [*messages, {"role": "assistant", "content": said}]

        def answer(question: str) -> str:
            reply = client.completions.create(
                model="default",
                prompt=f"{SHOTS}Question: {question}\nAnswer:",
                max_tokens=QA_TOKENS,
                temperature=0,
                stop="\n",
            )
            return str(reply.choices[0].text)

        def tree(ask_all: Callable[[Any, list[Any]], Any]) -> None:
            level = [[{"role": "user", "content": PROBLEM}]]
            for _ in range(DEPTH):
                asked = [
                    [*messages, {"role": "user", "content": STEP.format(i + 1)}]
                    for messages in level
                    for i in range(BRANCHING)
                ]
                level = list(ask_all(ask, asked))

        with ThreadPoolExecutor(THREADS) as pool:
            ways: dict[str, dict[str, Callable[[], Any]]] = {
                "tree of thought": {
                    "sgl": lambda: PROGRAMS["tree of thought"](runtime),
                    "threads": lambda: tree(pool.map),
                    "loop": lambda: tree(map),
                },
                "5-shot QA": {
                    "sgl": lambda: PROGRAMS["5-shot QA"](runtime),
                    "threads": lambda: list(pool.map(answer, QUESTIONS)),
                    "loop": lambda: [answer(question) for question in QUESTIONS],
                },
            }
            for name, runs in ways.items():
                seconds: dict[str, list[float]] = {way: [] for way in runs}
                for _ in range(options.rounds):
                    for way, run in runs.items():
                        with _timed(runtime, seconds[way]):
                            run()
                median = {way: statistics.median(took) for way, took in seconds.items()}
                over = {way: round(median[way] / median["sgl"], 2) for way in ("threads", "loop")}
                yield {"by_hand": name, "seconds": seconds, "times_as_long_by_hand": over}


@contextmanager
def _timed(runtime: sgl.Runtime, seconds: list[float]) -> Iterator[None]:
    _flush(runtime)
    begun = time.perf_counter()
    yield
    seconds.append(round(time.perf_counter() - begun, 3))


def _flush(runtime: sgl.Runtime) -> None:
    while not sgl.flush_cache(runtime):
        time.sleep(0.05)


CASES = {"overhead": overhead, "reuse": reuse, "by-hand": by_hand}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="lines are added to what is there")
    options = parser.parse_args()
    known = {key: environment()[key] for key in ("device", "commit", "python")}
    for name in options.cases:
        for line in CASES[name](options):
            text = json.dumps(known | line)
            print(text, flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
