"""`/v1/chat/completions`: messages to a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

from sgl.errors import InvalidRequestError
from sgl.messages import LogprobOptions
from sgl.protocol.body import MAX_TOP_LOGPROBS, convert, parse_fields, refuse_unsupported
from sgl.protocol.call import GenerationCall, PromptCall
from sgl.protocol.chat_template import PROVIDED_NAMES
from sgl.protocol.openai import (
    NOT_YET,
    Frame,
    SamplingBody,
    Server,
    frame,
    namespace,
    refuse_range,
    sampling_params,
)
from sgl.protocol.openai_grammar import grammar_of

DEFAULT_TEMPERATURE = 0.7
MAX_MESSAGES = 4096
MAX_TEMPLATE_OPTIONS = 16


class Template(Protocol):
    """What turns messages to a prompt."""

    @property
    def stop(self) -> tuple[str, ...]: ...

    @property
    def needs_special_tokens(self) -> bool:
        """The rendered text has no beginning-of-sequence token: the tokenizer adds its own."""

    def render(
        self,
        messages: list[dict[str, Any]],
        /,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str: ...

    def begin_answer(self, text: str) -> str:
        """The beginning of an answer that the client gave, to follow on a prompt."""


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class Message(msgspec.Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatBody(SamplingBody, kw_only=True):
    """The fields of `/v1/chat/completions` besides the shared ones."""

    messages: list[Message] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A call, and what its response should look like."""

    call: GenerationCall
    frame: Frame


def parse_chat(body: bytes, server: Server, template: Template | None) -> ChatRequest:
    """The request in the body of a POST; raises InvalidRequestError."""
    fields = parse_fields(body)
    refuse_unsupported(fields, (*NOT_YET, "functions"))
    chat = convert(fields, ChatBody)
    _check(chat)
    if template is None:
        raise InvalidRequestError(
            "this model has no chat template: use /v1/completions, or start the server with "
            "--chat-template"
        )
    head = frame(chat, server, "chatcmpl")
    max_tokens = (
        chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens
    )
    sampling = sampling_params(
        chat,
        max_new_tokens=max_tokens,
        temperature=DEFAULT_TEMPERATURE if chat.temperature is None else chat.temperature,
        stop=[*_stops(chat.stop), *template.stop],
    )
    prompt = PromptCall(
        prompt=_render(chat, template),
        sampling=sampling,
        logprobs=LogprobOptions(top_num=chat.top_logprobs or 0) if chat.logprobs else None,
        rid=head.id,
        is_length_explicit=max_tokens is not None,
        grammar=grammar_of(chat),
    )
    call = GenerationCall(
        prompts=(prompt,),
        n=sampling.n,
        stream=bool(chat.stream),
        add_special_tokens=template.needs_special_tokens,
        namespace=namespace(chat),
    )
    return ChatRequest(call=call, frame=head)


def _check(body: ChatBody) -> None:
    if not body.messages or len(body.messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages must be a list of 1 to {MAX_MESSAGES} messages", param="messages"
        )
    refuse_range("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    if body.tools and body.tool_choice != "none":
        raise InvalidRequestError(
            "tool calls are not supported by this server yet: leave out tools, or set tool_choice "
            'to "none"',
            param="tools",
        )


def _stops(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


def _render(body: ChatBody, template: Template) -> str:
    """The prompt. An assistant's last message is the beginning of the answer to be continued."""
    messages = [_as_dict(message, number) for number, message in enumerate(body.messages or [])]
    options = _template_options(body.chat_template_kwargs or {})
    prefill = ""
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        prefill = messages.pop()["content"]
    return template.render(messages, **options) + template.begin_answer(prefill)


def _as_dict(message: Message, number: int) -> dict[str, Any]:
    """The message as templates know it: content is one text, there is no developer role."""
    role = "system" if message.role == "developer" else message.role
    if message.content is None and role != "assistant":
        raise InvalidRequestError(
            f"messages[{number}] has no content", param=f"messages[{number}].content"
        )
    fields: dict[str, Any] = {"role": role, "content": _text(message.content, number)}
    for name in ("name", "tool_calls", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    return fields


def _text(content: str | list[ContentPart] | None, number: int) -> str:
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.type != "text" or part.text is None:
            raise InvalidRequestError(
                f"messages[{number}] has a content part of type {part.type!r:.40}: this server "
                "takes text parts only",
                param=f"messages[{number}].content",
            )
    return "".join(part.text or "" for part in content)


def _template_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if len(options) > MAX_TEMPLATE_OPTIONS or not PROVIDED_NAMES.isdisjoint(options):
        raise InvalidRequestError(
            f"chat_template_kwargs may hold {MAX_TEMPLATE_OPTIONS} names, none of them "
            f"{', '.join(sorted(PROVIDED_NAMES))}",
            param="chat_template_kwargs",
        )
    return options
