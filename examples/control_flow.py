"""A program that branches on a choice of the model: calculator or search engine.

Prints, for each question, the tool, how likely the model found each tool, and what it would give
to the tool.
"""

from __future__ import annotations

import argparse

import sgl

TOOLS = ["calculator", "search engine"]
QUESTIONS = ["What is 7 times 9?", "Who was the first man on the moon?"]


@sgl.function
def use_tool(s: sgl.ProgramState, question: str) -> None:
    s += f"To answer the question '{question}' I need to use a "
    s += sgl.select("tool", TOOLS)
    # Reading a variable waits for it. The branch is ordinary Python.
    if s["tool"] == "calculator":
        s += ". The expression to type is: " + sgl.gen("expression", max_tokens=12, stop="\n")
    else:
        s += ". The words to search for are: " + sgl.gen("keywords", max_tokens=12, stop="\n")


def main(argv: list[str] | None = None) -> list[sgl.ProgramState]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    states = [use_tool.run(question, temperature=0) for question in QUESTIONS]
    for question, state in zip(QUESTIONS, states, strict=True):
        # The mean log-probability of each choice: the tool with the largest one was selected.
        scores = state.get_meta_info("tool")["normalized_prompt_logprobs"]
        told = ", ".join(f"{tool} {score:.2f}" for tool, score in zip(TOOLS, scores, strict=True))
        variable = "expression" if "expression" in state else "keywords"
        print(f"{question}\n  {state['tool']} ({told})\n  {variable}: {state[variable].strip()}")
    return states


if __name__ == "__main__":
    main()
