"""A chat of two questions: the second one builds on the answer to the first.

Prints the conversation, one line per message.
"""

from __future__ import annotations

import argparse

import sgl


@sgl.function
def two_questions(s: sgl.ProgramState, country: str) -> None:
    s += sgl.system("You are a helpful assistant.")
    s += sgl.user(f"What is the capital of {country}?")
    s += sgl.assistant(sgl.gen("capital", max_tokens=16))
    # The model sees everything above, so it knows which city is meant.
    s += sgl.user("Name an interesting building in this city.")
    s += sgl.assistant(sgl.gen("building", max_tokens=24))


def main(argv: list[str] | None = None) -> sgl.ProgramState:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    state = two_questions.run(country="France", temperature=0)
    for message in state.messages():
        print(f"{message['role']}: {message['content']}")
    return state


if __name__ == "__main__":
    main()
