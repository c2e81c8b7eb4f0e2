"""Text that is shown while it is generated: the whole of it, one variable, and on an event loop.

Prints three texts, each piece of a text as soon as it is there, with "|" between pieces.
"""

from __future__ import annotations

import argparse
import asyncio

import sgl


@sgl.function
def fruit_story(s: sgl.ProgramState, fruit: str) -> None:
    s += f"Once upon a time, an {fruit}" + sgl.gen("begin", max_tokens=12)
    s += f"... In the end, the {fruit}" + sgl.gen("end", max_tokens=12)


def whole_text(fruit: str) -> list[str]:
    """Without a name, the pieces are those of the whole text, the prompt included."""
    pieces = []
    state = fruit_story.run(fruit, temperature=0, stream=True)
    for piece in state.text_iter():
        print(piece, end="|", flush=True)
        pieces.append(piece)
    return pieces


def one_variable(fruit: str, name: str) -> list[str]:
    """Only what the model writes for this variable."""
    pieces = []
    state = fruit_story.run(fruit, temperature=0, stream=True)
    for piece in state.text_iter(name):
        print(piece, end="|", flush=True)
        pieces.append(piece)
    return pieces


async def on_an_event_loop(fruit: str, name: str) -> list[str]:
    """The same without blocking other tasks of the loop."""
    pieces = []
    state = fruit_story.run(fruit, temperature=0, stream=True)
    async for piece in state.text_async_iter(name):
        print(piece, end="|", flush=True)
        pieces.append(piece)
    return pieces


def main(argv: list[str] | None = None) -> dict[str, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    print("--- the whole text")
    whole = whole_text("apple")
    print("\n--- one variable")
    end = one_variable("apple", "end")
    print("\n--- one variable, on an event loop")
    end_async = asyncio.run(on_an_event_loop("apple", "end"))
    print()
    return {"whole": whole, "end": end, "end_async": end_async}


if __name__ == "__main__":
    main()
