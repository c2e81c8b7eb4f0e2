"""Several programs on one event loop, as in a web server: each answer is sent as it comes.

With `stream=True`, `run` returns at once, and the body runs on a thread of its own. So a body may
wait for its variables without holding up the loop.

Prints the pieces as they come, each with the number of its program, then the answers.
"""

from __future__ import annotations

import argparse
import asyncio

import sgl

QUESTIONS = [
    "What is the capital of France?",
    "What color is the sky?",
    "What is the opposite of hot?",
]


@sgl.function
def ask(s: sgl.ProgramState, question: str) -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=16))


async def answer(number: int, question: str, order: list[int]) -> str:
    """The answer; `order` gets the program's number for each piece."""
    pieces = []
    state = ask.run(question, temperature=0, stream=True)
    async for piece in state.text_async_iter("answer"):
        print(f"{number}: {piece!r}")
        order.append(number)
        pieces.append(piece)
    return "".join(pieces)


async def answer_all(questions: list[str]) -> tuple[list[str], list[int]]:
    """The answers, and the order in which the pieces came."""
    order: list[int] = []
    answers = await asyncio.gather(
        *(answer(number, question, order) for number, question in enumerate(questions))
    )
    return answers, order


def main(argv: list[str] | None = None) -> tuple[list[str], list[int]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    answers, order = asyncio.run(answer_all(QUESTIONS))
    for question, text in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {text}")
    return answers, order


if __name__ == "__main__":
    main()
