"""The kinds of servers: where each takes requests, and what a request to it looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import orjson

from sgl.bench.prompts import Content, Schema

Api: TypeAlias = Literal["native", "completions", "chat"]

PATHS: Mapping[Api, str] = {
    "native": "/generate",
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
}


@dataclass(frozen=True, slots=True)
class Backend:
    """One kind of server.

    has_ignore_eos  it knows the field `ignore_eos`, which OpenAI's API does not have
    takes_ids       a prompt may be a list of token ids
    """

    api: Api
    port: int
    has_ignore_eos: bool = True
    takes_ids: bool = True


BACKENDS = {
    "sgl": Backend("native", 30000),
    "sgl-oai": Backend("completions", 30000),
    "sgl-oai-chat": Backend("chat", 30000, takes_ids=False),
    "vllm": Backend("completions", 8000),
    "vllm-chat": Backend("chat", 8000, takes_ids=False),
    "lmdeploy": Backend("completions", 23333, takes_ids=False),
    "lmdeploy-chat": Backend("chat", 23333, takes_ids=False),
    "openai": Backend("completions", 30000, has_ignore_eos=False),
    "openai-chat": Backend("chat", 30000, has_ignore_eos=False, takes_ids=False),
}
OTHER_NAMES = {
    "sglang": "sgl",
    "sglang-native": "sgl",
    "sglang-oai": "sgl-oai",
    "sglang-oai-chat": "sgl-oai-chat",
    "openai-compatible": "openai",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyMaker:
    """What all requests of a run have in common.

    schema_mode  the field a schema is sent in: json_schema, response_format, or off for none
    extra        merged into each body last
    """

    backend: Backend
    model: str
    is_stream: bool = True
    ignores_eos: bool = True
    schema_mode: str = "off"
    extra: Mapping[str, Any]

    def body(self, content: Content, output_len: int, schema: Schema | None = None) -> bytes:
        """The JSON of one request that asks for an answer of `output_len` tokens."""
        constraint = self._constraint(schema)
        # a grammar says itself where the answer ends, so the end must be allowed then
        sampling: dict[str, Any] = {"temperature": 0.0, **constraint}
        if self.backend.has_ignore_eos:
            sampling["ignore_eos"] = self.ignores_eos and not constraint
        if self.backend.api == "native":
            prompt = {"text" if isinstance(content, str) else "input_ids": content}
            params = {"sampling_params": {"max_new_tokens": output_len, **sampling}}
            return orjson.dumps(merged({**prompt, **params, "stream": self.is_stream}, self.extra))
        fields = {"model": self.model, **self._prompt(content, output_len), **sampling}
        fields["stream"] = self.is_stream
        if self.is_stream:
            fields["stream_options"] = {"include_usage": True}
        return orjson.dumps(merged(fields, self.extra))

    def _prompt(self, content: Content, output_len: int) -> dict[str, Any]:
        if self.backend.api == "completions":
            return {"prompt": content, "max_tokens": output_len}
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return {"messages": messages, "max_completion_tokens": output_len}

    def _constraint(self, schema: Schema | None) -> dict[str, Any]:
        if schema is None or self.schema_mode == "off":
            return {}
        if self.schema_mode == "json_schema":
            return {"json_schema": orjson.dumps(schema).decode()}
        described = {"name": "record", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": described}}


def merged(body: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with what `extra` says instead or besides; objects inside are merged, too."""
    result = dict(body)
    for name, value in extra.items():
        mine = result.get(name)
        if isinstance(mine, dict) and isinstance(value, dict):
            result[name] = merged(mine, value)
        else:
            result[name] = value
    return result
