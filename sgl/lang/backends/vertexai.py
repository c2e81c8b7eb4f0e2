"""Google's models on Vertex AI."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sgl.errors import ConfigError
from sgl.lang.backends.api import (
    ApiBackend,
    Fields,
    conversation,
    image_parts,
    missing,
    split_system,
)
from sgl.lang.ir import Sampling
from sgl.lang.prompt import Answer, Message, Prompt

_NAMES = {"max_tokens": "max_output_tokens", "stop": "stop_sequences"}
_ROLES = {"user": "user", "assistant": "model"}


class VertexAI(ApiBackend):
    """A model on Vertex AI.

    safety_settings  as the SDK has them
    client_args      of the SDK's client: credentials, http_options, …

    The project and its place are those of the environment: GCP_PROJECT_ID, GCP_LOCATION. Raises
    ImportError where the SDK is not installed, and ConfigError where no project is named.
    """

    supported: tuple[str, ...] = (
        *("max_tokens", "stop", "temperature", "top_p", "top_k", "json_schema"),
        *("frequency_penalty", "presence_penalty"),
    )

    def __init__(
        self,
        model_name: str,
        safety_settings: Sequence[Any] | None = None,
        **client_args: Any,
    ) -> None:
        try:
            from google import genai
        except ImportError:
            raise missing("google-genai", "vertexai", "VertexAI") from None
        super().__init__()
        project = client_args.pop("project", None) or os.environ.get("GCP_PROJECT_ID")
        location = client_args.pop("location", None) or os.environ.get("GCP_LOCATION")
        if project is None:
            raise ConfigError(
                "VertexAI needs a project of yours: export GCP_PROJECT_ID=... GCP_LOCATION=..."
            )
        self.model_name = model_name
        self._safety_settings = safety_settings
        given: Fields = {"project": project, "location": location} | client_args
        self._connect(lambda: genai.Client(vertexai=True, **given).aio)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        reply = await self._client.models.generate_content(**self._call(prompt, sampling))
        self._count(reply.usage_metadata)
        return Answer(_text(reply), _meta_info(reply))

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Answer]:
        meta_info: Fields = {}
        text, usage = "", None
        call = self._call(prompt, sampling)
        async for event in await self._client.models.generate_content_stream(**call):
            text += _text(event)
            meta_info |= _meta_info(event)
            usage = event.usage_metadata or usage  # each has the sum so far
            yield Answer(text, meta_info)
        self._count(usage)

    def _call(self, prompt: Prompt, sampling: Sampling) -> Fields:
        system, messages = split_system(conversation(prompt))
        known = self.known(prompt, sampling)
        config: Fields = {_NAMES.get(name, name): value for name, value in known.items()}
        if (schema := config.pop("json_schema", None)) is not None:
            config["response_mime_type"] = "application/json"
            config["response_json_schema"] = json.loads(schema)
        if system:
            config["system_instruction"] = system
        if self._safety_settings is not None:
            config["safety_settings"] = list(self._safety_settings)
        contents = [{"role": _ROLES[one["role"]], "parts": _parts(one)} for one in messages]
        return {"model": self.model_name, "contents": contents, "config": config}

    def _count(self, usage: Any) -> None:
        if usage is not None:
            self.token_usage.add(usage.prompt_token_count, usage.candidates_token_count)


def _parts(message: Message) -> list[Fields]:
    return [
        {"text": part}
        if isinstance(part, str)
        else {"inline_data": {"mime_type": part[0], "data": base64.b64decode(part[1])}}
        for part in image_parts(message)
    ]


def _text(reply: Any) -> str:
    """Of the first candidate; thoughts are not part of it."""
    for candidate in reply.candidates or ():
        parts = (candidate.content and candidate.content.parts) or ()
        return "".join(part.text for part in parts if part.text and not part.thought)
    return ""


def _meta_info(reply: Any) -> Fields:
    meta_info: Fields = {}
    for candidate in reply.candidates or ():
        if candidate.finish_reason is not None:
            meta_info["finish_reason"] = candidate.finish_reason.value
    if (usage := reply.usage_metadata) is not None:
        meta_info["prompt_tokens"] = usage.prompt_token_count
        meta_info["completion_tokens"] = usage.candidates_token_count
    return meta_info
