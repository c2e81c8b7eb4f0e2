"""The messages of a chat, as clients send them and as chat templates know them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from sgl.errors import InvalidRequestError
from sgl.protocol.body import one_of


class ContentPart(msgspec.Struct, kw_only=True):
    """A piece of a message; their texts are joined.

    type, text   this server takes text only
    """

    type: Annotated[str, one_of("text")]
    text: str | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    """What the model asked to be called.

    name       of the function
    arguments  the text of an object, as OpenAI has it, or the object
    """

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, kw_only=True):
    """A call in an answer that the client repeats.

    function  what was called
    id        the message with the result of the call names it
    type      functions only
    """

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, kw_only=True):
    """One message of a chat.

    role               developer is another word for system; tool: the result of a call
    content            only an assistant's message may have none
    name               for the chat template
    tool_calls         of an assistant's message: what it asked to be called
    tool_call_id       of a result: which call it is of
    reasoning_content  of an assistant's message: what it thought, for the chat template
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


def template_messages(
    messages: Sequence[Message], *, has_objects: bool = True
) -> list[dict[str, Any]]:
    """Content is one text, there is no developer role.

    has_objects   arguments of calls are objects where they are JSON, as most templates want them;
                  otherwise texts
    """
    return [
        _as_dict(message, number, has_objects=has_objects)
        for number, message in enumerate(messages)
    ]


def _as_dict(message: Message, number: int, *, has_objects: bool) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if message.content is None and role != "assistant":
        raise InvalidRequestError(
            f"messages[{number}] has no content", param=f"messages[{number}].content"
        )
    fields: dict[str, Any] = {"role": role, "content": _text(message.content, number)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    if message.tool_calls:
        fields["tool_calls"] = [_call(call, has_objects=has_objects) for call in message.tool_calls]
    return fields


def _text(content: str | list[ContentPart] | None, number: int) -> str:
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.type == "text" and part.text is None:
            raise InvalidRequestError(
                f"messages[{number}] has a content part of type 'text' without text",
                param=f"messages[{number}].content",
            )
        if part.type != "text":
            raise InvalidRequestError(
                f"messages[{number}] has a content part of type {part.type!r:.40}: this server "
                "takes text parts only",
                param=f"messages[{number}].content",
            )
    return "".join(part.text or "" for part in content)


def _call(call: ToolCall, *, has_objects: bool) -> dict[str, Any]:
    arguments = call.function.arguments
    if has_objects:
        arguments = _as_object(arguments)
    elif isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": call.function.name, "arguments": arguments}
    fields: dict[str, Any] = {"type": call.type, "function": function}
    return fields if call.id is None else {"id": call.id, **fields}


def _as_object(arguments: str | dict[str, Any] | None) -> Any:
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        found = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments
