"""One program for many inputs, with a few worked questions as its beginning (few-shot).

`run_batch` answers them side by side and gives the states in the order of the inputs. The worked
questions are the same in each prompt, so the server computes them once.

Prints a progress bar (on stderr), each question with its answer, and how many are right.
"""

from __future__ import annotations

import argparse

import sgl

EXAMPLES = """\
Q: What is the capital of Italy?
A: Rome

Q: What is the capital of Egypt?
A: Cairo

"""
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "Spain": "Madrid",
    "Russia": "Moscow",
    "Greece": "Athens",
}


@sgl.function
def capital_of(s: sgl.ProgramState, country: str) -> None:
    s += EXAMPLES
    s += f"Q: What is the capital of {country}?\nA:"
    s += sgl.gen("answer", max_tokens=8, stop="\n")


def main(argv: list[str] | None = None) -> list[sgl.ProgramState]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    arguments = [{"country": country} for country in CAPITALS]
    states: list[sgl.ProgramState] = capital_of.run_batch(
        arguments, temperature=0, progress_bar=True
    )
    num_right = 0
    for (country, capital), state in zip(CAPITALS.items(), states, strict=True):
        answer = state["answer"].strip()
        num_right += answer == capital
        print(f"{country}: {answer}")
    print(f"{num_right} of {len(CAPITALS)} are right")
    return states


if __name__ == "__main__":
    main()
