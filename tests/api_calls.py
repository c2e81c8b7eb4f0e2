"""What the programs of programs.py ask of models behind APIs: every request, in full."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_apis import Body, FakeApi, running
from programs import PROGRAMS

import sgl
from sgl.lang.backends.api import ApiBackend

FILE = Path(__file__).parent / "data" / "api_calls.json"
SAID = "A few words, and a 42. Then more\nand more."


class Letters:
    """A tokenizer with a token for each letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def _completions(url: str) -> ApiBackend:
    model = "gpt-3.5-turbo-instruct"
    return sgl.OpenAI(model, tokenizer=Letters(), api_key="none", base_url=url + "/v1")


BACKENDS: dict[str, Callable[[str], ApiBackend]] = {
    "completions": _completions,
    "chat": lambda url: sgl.OpenAI("gpt-4o", api_key="none", base_url=url + "/v1"),
    "anthropic": lambda url: sgl.Anthropic("claude", api_key="none", base_url=url),
}


def calls(name: str, kind: str) -> dict[str, Any]:
    """The requests of a program, the shortest first, and how it ends.

    Copies send theirs side by side; where there are none, prompts grow.
    """
    program, arguments = PROGRAMS[name]
    with running(FakeApi(_say)) as api, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error: BaseException | None = None
        try:
            state = program.run(backend=BACKENDS[kind](api.url), temperature=0, **arguments)
            error = state.error()
        except Exception as raised:
            error = raised
        requests = sorted(map(_named, api.requests), key=lambda it: (len(json.dumps(it)), str(it)))
        found: dict[str, Any] = {"requests": requests}
        if error is not None:
            found["error"] = f"{type(error).__name__}: {error}"
        return found


def _say(body: Body) -> str:
    return SAID


def _named(request: tuple[str, Body]) -> dict[str, Any]:
    path, body = request
    return {"path": path} | body
