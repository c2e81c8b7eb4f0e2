"""Questions about pictures, to a model that sees, behind OpenAI's API.

Pictures are paths, bytes of a file, or PIL images; a message may hold several. Without any, two are
drawn here. Prints what the model says of each, then of all of them together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

import sgl

Picture = str | Path | bytes | Image.Image


@sgl.function
def describe(s: sgl.ProgramState, picture: Picture) -> None:
    s += sgl.user(sgl.image(picture) + "Say in one sentence what this shows.")
    s += sgl.assistant(sgl.gen("sentence", max_tokens=48))


@sgl.function
def compare(s: sgl.ProgramState, pictures: list[Picture]) -> None:
    with s.user():
        for number, picture in enumerate(pictures, 1):
            s += f"Picture {number}: " + sgl.image(picture) + "\n"
        s += "What do they have in common?"
    s += sgl.assistant(sgl.gen("answer", max_tokens=48))


def drawn() -> list[Picture]:
    """A red square and a blue one."""
    return [Image.new("RGB", (224, 224), colour) for colour in ("red", "blue")]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="*", help="files: JPEG, PNG, …")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    parser.add_argument("--model", default="default", help="its name at the API")
    parser.add_argument("--api-key", default="none")
    options = parser.parse_args(argv)
    server = {"base_url": options.url + "/v1", "api_key": options.api_key}
    backend = sgl.OpenAI(options.model, **server)

    pictures = options.pictures or drawn()
    arguments = [{"picture": picture} for picture in pictures]
    states = describe.run_batch(arguments, backend=backend, temperature=0)
    for number, state in enumerate(states, 1):
        print(f"picture {number}: {state['sentence']}")
    together = compare.run(pictures, backend=backend, temperature=0)
    print(f"together: {together['answer']}")
    return {"each": states, "together": together}


if __name__ == "__main__":
    main()
