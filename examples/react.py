"""A model that acts: it thinks, looks something up, sees what it found, and goes on.

The action is one of some choices, so the program can always carry it out.

Prints the transcript of thoughts, actions and observations, and the answer.
"""

from __future__ import annotations

import argparse

import sgl

FACTS = {
    "Eiffel Tower": "The Eiffel Tower stands in Paris and is 330 metres high.",
    "Big Ben": "Big Ben stands in London and is 96 metres high.",
    "Leaning Tower": "The Leaning Tower stands in Pisa and is 57 metres high.",
}
WORKED_EXAMPLE = """\
Question: How high is the Leaning Tower?
Thought: I need to look up the Leaning Tower.
Action: Look up Leaning Tower
Observation: The Leaning Tower stands in Pisa and is 57 metres high.
Thought: I know how high the Leaning Tower is.
Action: Finish
Answer: 57 metres

"""
LOOK_UP = "Look up "
FINISH = "Finish"
MAX_STEPS = 3


def look_up(name: str) -> str:
    """The tool. Any Python could be here: a search, a database, another program."""
    return FACTS[name]


@sgl.function
def react(s: sgl.ProgramState, question: str) -> None:
    s += WORKED_EXAMPLE
    # The scope makes a variable of everything that is added inside.
    with s.var_scope("transcript"):
        s += f"Question: {question}\n"
        actions = [*(LOOK_UP + name for name in FACTS), FINISH]
        for _ in range(MAX_STEPS):
            s += "Thought:" + sgl.gen("thought", max_tokens=20, stop="\n")
            s += "\nAction: " + sgl.select("action", actions) + "\n"
            action = s["action"]
            if action == FINISH:
                break
            s += f"Observation: {look_up(action.removeprefix(LOOK_UP))}\n"
            actions.remove(action)  # small models like to repeat themselves
        s += "Answer:" + sgl.gen("answer", max_tokens=12, stop="\n")


def main(argv: list[str] | None = None) -> sgl.ProgramState:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    state = react.run("How high is Big Ben?", temperature=0)
    print(state["transcript"])
    return state


if __name__ == "__main__":
    main()
