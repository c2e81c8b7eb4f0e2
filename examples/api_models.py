"""Programs on a model behind OpenAI's API: the server's own, or any other that speaks it.

Prints a chat, then a list that one call answers, with the tokens of prompts that were sent for it.
"""

from __future__ import annotations

import argparse
from typing import Any

import sgl


@sgl.function
def chat(s: sgl.ProgramState) -> None:
    s += sgl.user("What is the capital of France?")
    s += sgl.assistant(sgl.gen("capital", max_tokens=16))
    s += sgl.user("And of Italy?")
    s += sgl.assistant(sgl.gen("other", max_tokens=16))


def count(s: sgl.ProgramState) -> None:
    s += "One, two, three, four,"
    for name in ("a", "b", "c"):
        s += sgl.gen(name, stop=",", max_tokens=8) + ","


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    parser.add_argument("--model", default="default", help="its name at the API")
    parser.add_argument("--api-key", default="none")
    options = parser.parse_args(argv)
    server = {"base_url": options.url + "/v1", "api_key": options.api_key}

    state = chat.run(backend=sgl.OpenAI(options.model, **server), temperature=0)
    for message in state.messages():
        print(f"{message['role']}: {message['content']}")

    sent = {}
    for name, tokens in (("one call for each", None), ("one call for all", 24)):
        # a model for completions goes on with a text, so the next words are already there
        backend = sgl.OpenAI(options.model, is_chat_model=False, **server)
        program = sgl.function(num_api_spec_tokens=tokens)(count)
        counted = program.run(backend=backend, temperature=0)
        counted.sync()
        sent[name] = backend.token_usage.prompt_tokens
        print(f"{name}: {counted.text()} ({sent[name]} tokens of prompts)")
    return {"chat": state, "sent": sent}


if __name__ == "__main__":
    main()
