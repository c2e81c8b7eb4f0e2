"""Anthropic's models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from sgl.lang.backends.api import (
    MAX_RETRIES,
    ApiBackend,
    Fields,
    image_parts,
    missing,
    split_system,
)
from sgl.lang.chat_template import TEMPLATES
from sgl.lang.ir import DEFAULTS, Sampling
from sgl.lang.prompt import Answer, Message, Prompt

_NEW_MODELS_TAKE_NONE = ("temperature", "top_p", "top_k")  # nor has their SDK a word for them


class Anthropic(ApiBackend):
    """A model behind Anthropic's API, which can go on with a message that has begun.

    client_args  of the SDK's client: api_key, base_url, timeout, max_retries, …

    Raises ImportError where the SDK is not installed.
    """

    supported: tuple[str, ...] = ("max_tokens", "stop", "temperature", "top_p", "top_k")
    chat_template = TEMPLATES["claude"]

    def __init__(self, model_name: str, **client_args: Any) -> None:
        try:
            from anthropic import AsyncAnthropic
        except ImportError:
            raise missing("anthropic", "anthropic", "Anthropic") from None
        super().__init__()
        self.model_name = model_name
        given = {"max_retries": MAX_RETRIES} | client_args
        self._connect(partial(AsyncAnthropic, **given))

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        fields, cut_at = self._call(prompt, sampling)
        return self._answer(await self._client.messages.create(**fields), cut_at)

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Answer]:
        fields, cut_at = self._call(prompt, sampling)
        text = ""
        async with self._client.messages.stream(**fields) as events:
            async for piece in events.text_stream:
                text += piece
                yield Answer(_before(text, cut_at))
            yield self._answer(await events.get_final_message(), cut_at)

    def _call(self, prompt: Prompt, sampling: Sampling) -> tuple[Fields, list[str]]:
        """What the SDK gets; and the stops that the API does not take, as they are but space."""
        if prompt.begun is None:
            raise RuntimeError(
                "Anthropic's models answer messages: put gen(...) into assistant, after user"
            )
        system, messages = split_system(prompt.messages)
        fields: Fields = {
            "model": self.model_name,
            "messages": [{"role": one["role"], "content": _content(one)} for one in messages],
            "max_tokens": DEFAULTS.max_tokens,  # which the API wants to be said
        }
        if begun := prompt.begun.rstrip():
            fields["messages"].append({"role": "assistant", "content": begun})
        if system:
            fields["system"] = system
        known = self.known(prompt, sampling)
        stops = known.pop("stop", [])
        if sent := [stop for stop in stops if stop.strip()]:
            fields["stop_sequences"] = sent
        if known.get("temperature") == DEFAULTS.temperature:  # the API's own, too
            del known["temperature"]
        if body := {name: known.pop(name) for name in _NEW_MODELS_TAKE_NONE if name in known}:
            fields["extra_body"] = body
        return fields | known, [stop for stop in stops if not stop.strip()]

    def _answer(self, message: Any, cut_at: Sequence[str]) -> Answer:
        usage = message.usage
        self.token_usage.add(usage.input_tokens, usage.output_tokens)
        text = "".join(part.text for part in message.content if part.type == "text")
        return Answer(
            _before(text, cut_at),
            {
                "id": message.id,
                "finish_reason": message.stop_reason,
                "prompt_tokens": usage.input_tokens,
                "completion_tokens": usage.output_tokens,
            },
        )


def _before(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)]


def _content(message: Message) -> str | list[Fields]:
    if isinstance(message["content"], str):
        return message["content"]
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {
            "type": "image",
            "source": {"type": "base64", "media_type": part[0], "data": part[1]},
        }
        for part in image_parts(message)
    ]
