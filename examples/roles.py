"""The three ways to write roles. They make the same prompt.

Roles are written as the model's own chat template writes them.

Prints the prompt with the answer, and whether the three texts are equal.
"""

from __future__ import annotations

import argparse

import sgl

RULE = "You are a helpful assistant."
QUESTION = "What is the capital of France?"


@sgl.function
def as_calls(s: sgl.ProgramState) -> None:
    """The shortest one."""
    s += sgl.system(RULE)
    s += sgl.user(QUESTION)
    s += sgl.assistant("The answer is" + sgl.gen("answer", max_tokens=8))


@sgl.function
def as_begin_and_end(s: sgl.ProgramState) -> None:
    """For messages that are put together from many parts, in loops or in functions."""
    s += sgl.system_begin() + RULE + sgl.system_end()
    s += sgl.user_begin() + QUESTION + sgl.user_end()
    s += sgl.assistant_begin()
    s += "The answer is"
    s += sgl.gen("answer", max_tokens=8)
    s += sgl.assistant_end()


@sgl.function
def as_scopes(s: sgl.ProgramState) -> None:
    """The same, but the end cannot be forgotten."""
    with s.system():
        s += RULE
    with s.user():
        s += QUESTION
    with s.assistant():
        s += "The answer is"
        s += sgl.gen("answer", max_tokens=8)


def main(argv: list[str] | None = None) -> list[sgl.ProgramState]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    states = [program.run(temperature=0) for program in (as_calls, as_begin_and_end, as_scopes)]
    texts = [state.text() for state in states]
    print(texts[0])
    print(f"equal: {len(set(texts)) == 1}")
    return states


if __name__ == "__main__":
    main()
