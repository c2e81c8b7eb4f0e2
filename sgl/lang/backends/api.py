"""What models behind somebody's API have in common: messages in, an answer out, counted tokens."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sgl.lang.backends.base import Backend
from sgl.lang.backends.speculation import Speculation
from sgl.lang.ir import Sampling
from sgl.lang.loop import LoopThread, loop_thread
from sgl.lang.prompt import Answer, Message, Prompt

Fields: TypeAlias = "dict[str, Any]"

MAX_RETRIES = 3  # of a request that the API was too busy for

_NEUTRAL: Fields = {"top_k": -1, "min_p": 0.0, "min_tokens": 0, "ignore_eos": False}


@dataclass(slots=True)
class TokenUsage:
    """Tokens that an API has counted, of all programs."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        self.prompt_tokens += prompt_tokens or 0
        self.completion_tokens += completion_tokens or 0

    def reset(self) -> None:
        self.prompt_tokens = self.completion_tokens = 0


class ApiBackend(Backend):
    """
    is_chat      it takes messages and answers with one; False: it goes on with a text
    token_usage  what was used so far; `reset()` it where another count begins
    supported    the fields of `Sampling` that the API knows; of others a warning tells, once
    """

    max_programs = 96
    is_chat = True
    supported: tuple[str, ...] = ("max_tokens", "stop", "temperature", "top_p")

    def __init__(self) -> None:
        self.token_usage = TokenUsage()
        self._warned: set[str] = set()
        self._clients: dict[LoopThread, Any] = {}
        self._make_client: Callable[[], Any] | None = None

    @property
    def _client(self) -> Any:
        """Of the SDK. It belongs to a loop: a process that was forked gets one of its own."""
        thread = loop_thread()
        if thread not in self._clients:
            assert self._make_client is not None, "it has not connected"
            client = self._make_client()
            self._clients = {thread: client}
            thread.at_exit(getattr(client, "aclose", None) or client.close)
        return self._clients[thread]

    def _connect(self, make_client: Callable[[], Any]) -> None:
        """Raises what the SDK has against it."""
        self._make_client = make_client
        self._client  # noqa: B018  made now

    @abstractmethod
    def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Answer]: ...

    def speculating(self, num_tokens: int) -> Backend:
        return Speculation(self, num_tokens)

    def known(self, prompt: Prompt, sampling: Sampling) -> Fields:
        """What is said and known to the API, by our names; each stop once, the role's too."""
        sampling = sampling.with_stops(prompt.stops)
        said: Fields = {}
        for name in Sampling.__dataclass_fields__:
            value = getattr(sampling, name)
            if value is None or value == _NEUTRAL.get(name, object()):
                continue
            if name in self.supported:
                said[name] = value
            elif name not in self._warned:
                self._warned.add(name)
                warnings.warn(f"{type(self).__name__} has no {name}: it is not sent", stacklevel=2)
        if stops := said.pop("stop", None):
            said["stop"] = list(dict.fromkeys(stops))
        return said


def conversation(prompt: Prompt) -> list[Message]:
    """The messages so far; raises RuntimeError where an answer is to begin with given text."""
    if prompt.begun is None or prompt.begun.strip():
        raise RuntimeError(
            "a chat model answers whole messages: gen(...) must come right after assistant "
            "begins, and be all of it. To generate parts of a message, or several, let one call "
            "answer them: @sgl.function(num_api_spec_tokens=128)"
        )
    return list(prompt.messages)


def split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """What the system says, for APIs that take it apart from the messages; and the others."""
    system = [str(one["content"]) for one in messages if one["role"] == "system"]
    return "\n".join(system), [one for one in messages if one["role"] != "system"]


def missing(package: str, extra: str, backend: str) -> ImportError:
    return ImportError(f'sgl.{backend} needs {package}: pip install "sgl[{extra}]"')


def image_parts(message: Message) -> list[str | tuple[str, str]]:
    """The content of a message: texts, and images as media type and base64."""
    content = message["content"]
    if isinstance(content, str):
        return [content]
    parts: list[str | tuple[str, str]] = []
    for part in content:
        if part["type"] == "text":
            parts.append(part["text"])
        else:
            head, _, data = part["image_url"]["url"].partition(";base64,")
            parts.append((head.removeprefix("data:"), data))
    return parts
