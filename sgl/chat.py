"""`sgl chat`: talk in the terminal to any server with an OpenAI-compatible API.

you ── /v1/chat/completions, the whole conversation each time ──▶ server ── SSE ──▶ terminal
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from sgl.errors import ConfigError, SglError
from sgl.flags import OptionTable, field_options, flag, from_environment

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C cuts an answer short"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig:
    """The flags of `sgl chat`."""

    base_url: str | None = flag(
        "address of the server", default_text="http://HOST:PORT", metavar="URL"
    )
    host: str = flag("its host", default="127.0.0.1")
    port: int = flag("its port", default=30000, low=1, high=65535)
    model: str = flag("model to talk to", default="default", metavar="NAME")
    system: str | None = flag("system message the conversation begins with")
    temperature: float = flag("0 always takes the likeliest token", default=0.7, low=0)
    max_tokens: int = flag("longest answer, in tokens", default=1024, low=1)
    api_key: str | None = flag("key of the server", env="API_KEY", is_secret=True, metavar="KEY")

    def __post_init__(self) -> None:
        for option in field_options(ChatConfig):
            option.check(getattr(self, option.key))
        url = urlsplit(self.url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"--base-url must look like http://HOST:PORT, got {self.url}")

    @property
    def url(self) -> str:
        return self.base_url or f"http://{self.host}:{self.port}"

    @classmethod
    def from_argv(cls, argv: list[str]) -> ChatConfig:
        options = field_options(cls)
        values: dict[str, Any] = from_environment(options, os.environ)
        return cls(**(values | OptionTable(options).parse_argv(argv)))


class ServerRefusedError(SglError):
    """The server cannot be reached or answers with an error."""


@dataclass(slots=True)
class Conversation:
    """The messages so far, and how to get the next answer."""

    config: ChatConfig
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        system = self.config.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer; both sides are remembered, as far as it came."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            for piece in self._stream(asked):
                answer += piece
                yield piece
        finally:
            if answer:
                self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[str]:
        body = {
            "model": self.config.model,
            "messages": messages,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
            "stream": True,
        }
        headers = {"Content-Type": "application/json"}
        if self.config.api_key:
            headers["Authorization"] = f"Bearer {self.config.api_key}"
        url = urlsplit(self.config.url)
        kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
        connection = kind(url.hostname or "", url.port)
        path = url.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        try:
            connection.request("POST", path, json.dumps(body), headers)
            yield from _pieces(connection.getresponse())
        except (OSError, HTTPException) as error:
            raise ServerRefusedError(
                f"{self.config.url} does not answer ({error}): is the server running? "
                "Start one with `sgl serve`, or give --port or --base-url"
            ) from error
        finally:
            connection.close()


def main(argv: list[str]) -> int:
    conversation = Conversation(ChatConfig.from_argv(argv))
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 (line editing for input())

        print(HELP)
    while (text := _read_line("> " if is_terminal else "")) not in (None, "/exit", "/quit"):
        if text == "/reset":
            conversation.reset()
        elif text == "/help":
            print(HELP)
        elif text and not _answer(conversation, text) and not is_terminal:
            return 1
    return 0


def _answer(conversation: Conversation, text: str) -> bool:
    """Print the answer as it comes; False when the server gave none."""
    try:
        for piece in conversation.ask(text):
            print(piece, end="", flush=True)
    except ServerRefusedError as error:
        print(f"sgl chat: {error}", file=sys.stderr)
        return False
    except KeyboardInterrupt:
        pass
    print()
    return True


def _read_line(prompt: str) -> str | None:
    """None when the input has ended."""
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def _pieces(response: HTTPResponse) -> Iterator[str]:
    """The text of a stream of chat completion chunks."""
    if response.status != 200:
        raise ServerRefusedError(_error_text(response.read(), response.status))
    for line in response:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:"):
            continue
        if data == b"[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise ServerRefusedError(_error_text(data, 500))
        for choice in chunk["choices"]:
            if content := choice["delta"].get("content"):
                yield content


def _error_text(body: bytes, status: int) -> str:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {status}"
    return f"status {status}: {error['message'] if isinstance(error, dict) else error}"
