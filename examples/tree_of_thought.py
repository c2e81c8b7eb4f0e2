"""A tree of thoughts: each thought is continued in several ways, and the best leaf is taken.

Nothing is read while the tree grows, so all branches of a level are generated at the same time, and
what they share is computed once. A leaf's score is how much likelier the model finds "correct"
than "wrong" after it.

Prints each leaf with its score, best first.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import sgl

BRANCHING = 3
DEPTH = 2
QUESTION = "A farmer has 3 fields with 4 cows each and sells 2 cows. How many cows are left?"


@dataclass
class Leaf:
    thoughts: list[str]
    score: float


def grow(s: sgl.ProgramState, depth: int) -> list[sgl.ProgramState]:
    """The leaves below `s`. Part of a program may be a plain function that takes the state."""
    if depth == DEPTH:
        return [s]
    branches = s.fork(BRANCHING)
    # With a temperature of 0 all branches would say the same.
    branches += f"Step {depth + 1}:"
    branches += sgl.gen(f"thought_{depth}", max_tokens=16, stop="\n", temperature=0.8)
    branches += "\n"
    return [leaf for branch in branches for leaf in grow(branch, depth + 1)]


@sgl.function
def tree_of_thought(s: sgl.ProgramState, question: str) -> list[Leaf]:
    s += f"Question: {question}\nLet us think step by step.\n"
    leaves = grow(s, depth=0)
    for leaf in leaves:
        leaf += "This reasoning is" + sgl.select("verdict", [" correct", " wrong"])
    return sorted(map(scored, leaves), key=lambda leaf: leaf.score, reverse=True)


def scored(leaf: sgl.ProgramState) -> Leaf:
    correct, wrong = leaf.get_meta_info("verdict")["normalized_prompt_logprobs"]
    return Leaf([leaf[f"thought_{depth}"].strip() for depth in range(DEPTH)], correct - wrong)


def main(argv: list[str] | None = None) -> list[Leaf]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    leaves: list[Leaf] = tree_of_thought.run(QUESTION).ret_value
    for leaf in leaves:
        print(f"{leaf.score:+.2f}  {' / '.join(leaf.thoughts)}")
    return leaves


if __name__ == "__main__":
    main()
