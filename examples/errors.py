"""What goes wrong in a program, when it is told, and how to read it.

    where                                when it is told             what
    an argument of gen() that cannot be  at that line                ValueError, TypeError
    the body raises                      by `run` or `run_batch`     what it raised
    the server refuses a request         where the variable is read  BackendError
    no server answers                    by RuntimeEndpoint(...)     BackendError
    a variable that is never set         where it is read            UnknownVariableError

The errors of this package are in `sgl.errors`. `state.text()` and `state.messages()` do not raise:
after an error they give what was there before it, and `state.error()` tells whether there was one.

Prints each error with its notes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import sgl
from sgl.errors import SglError


@sgl.function
def story(s: sgl.ProgramState, temperature_of_end: float) -> None:
    s += "Once upon a time" + sgl.gen("begin", max_tokens=4)
    s += " and then" + sgl.gen("end", max_tokens=4, temperature=temperature_of_end)


@sgl.function
def half(s: sgl.ProgramState, number: int) -> None:
    s += f"Half of {number} is {number // 2}. So" + sgl.gen("more", max_tokens=4)
    if number % 2:
        raise ValueError(f"{number} is odd")


def wrong_argument() -> None:
    sgl.gen("year", regex="[0-9")


def body_raises() -> None:
    """The note says which run of the batch it was. The other runs are ended."""
    half.run_batch([{"number": number} for number in (2, 4, 5)])


def server_refuses() -> None:
    """What was generated before can still be read; the note names the variable that cannot."""
    state = story.run(temperature_of_end=-1.0)
    print(f"before the error: {state['begin']!r}, and the error without raising it:")
    print(f"  {type(state.error()).__name__}")
    state["end"]


def no_server() -> None:
    sgl.RuntimeEndpoint("http://127.0.0.1:9")


def unknown_variable() -> None:
    story.run(temperature_of_end=0.0)["middle"]


def caught(call: Callable[[], None]) -> Exception:
    try:
        call()
    except (SglError, ValueError) as error:
        return error
    raise AssertionError(f"{call.__name__} raised nothing")


def main(argv: list[str] | None = None) -> dict[str, Exception]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    calls = (wrong_argument, body_raises, server_refuses, no_server, unknown_variable)
    errors = {}
    for call in calls:
        print(f"--- {call.__name__}")
        error = errors[call.__name__] = caught(call)
        print(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}")
    return errors


if __name__ == "__main__":
    main()
