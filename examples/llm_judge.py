"""A text that is judged in several dimensions at the same time, and then as a whole.

The text comes first in the prompt, so that all judges share it and it is computed once.

Prints the judgement and the grade in each dimension, the mean grade, and the summary.
"""

from __future__ import annotations

import argparse
from statistics import mean

import sgl

ESSAY = """\
Cities should have more trees. Trees cool the streets in summer, clean the air and make people
happier. In one study, streets with trees were two degrees cooler than streets without."""
DIMENSIONS = ["clarity", "evidence", "style"]
GRADES = ["1", "2", "3", "4", "5"]


@sgl.function
def judge(s: sgl.ProgramState, essay: str) -> float:
    s += f"An essay:\n\n{essay}\n"
    judges = s.fork(len(DIMENSIONS))
    judges += lambda i: f"\nJudged by its {DIMENSIONS[i]}, this essay is"
    judges += sgl.gen("judgement", max_tokens=20, stop=[".", "\n"])
    judges += ". Grade from 1 (bad) to 5 (good): " + sgl.select("grade", GRADES)
    # Now `judgement` and `grade` are lists, in the order of the dimensions.
    judges.join()
    for dimension, judgement in zip(DIMENSIONS, s["judgement"], strict=True):
        s += f"\nJudged by its {dimension}, this essay is{judgement}."
    s += "\nIn short, this essay" + sgl.gen("summary", max_tokens=20, stop=[".", "\n"])
    # What a program returns is `ret_value` of its state.
    return mean(int(grade) for grade in s["grade"])


def main(argv: list[str] | None = None) -> sgl.ProgramState:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    state = judge.run(ESSAY, temperature=0)
    for row in zip(DIMENSIONS, state["grade"], state["judgement"], strict=True):
        print("{}: {} of 5,{}".format(*row))
    print(f"mean: {state.ret_value:.1f}")
    print(f"in short: this essay{state['summary']}")
    return state


if __name__ == "__main__":
    main()
