"""Routes that read a text as the answers of a model are read: its calls, its thoughts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web

from sgl.actors.access import Level
from sgl.actors.endpoint import Endpoint, Handler
from sgl.actors.http_body import read_body
from sgl.actors.middlewares import json_response
from sgl.config import REASONING_PARSER_SPELLINGS, TOOL_PARSER_SPELLINGS, ServerConfig
from sgl.errors import InvalidRequestError
from sgl.protocol.answer_format import AnswerFormat, AnswerReader
from sgl.protocol.answer_parts import Arguments, CallBegun, Content, Part, Thought
from sgl.protocol.answers import FoundCalls, FoundThoughts
from sgl.protocol.body import convert, one_of, parse_fields
from sgl.protocol.json_calls import HOLD_CHARS
from sgl.protocol.reasoning import (
    REASONING_FORMATS,
    ReasoningParser,
    thinking_after,
)
from sgl.protocol.tool_formats import TOOL_FORMATS
from sgl.protocol.tools import Tool, check_tools

MAX_TEXT_CHARS = 100_000

T = TypeVar("T")


class CallsBody(msgspec.Struct, kw_only=True):
    """A text to find calls in.

    text              what a model wrote
    tools             the functions that it could call
    tool_call_parser  the format of calls; the server's own if not given
    """

    text: str
    tools: list[Tool]
    tool_call_parser: Annotated[str, one_of(*TOOL_FORMATS)] | None = None


class ThoughtsBody(msgspec.Struct, kw_only=True):
    """A text to find thoughts in.

    text              what a model wrote
    reasoning_parser  the format of thoughts; the server's own if not given
    """

    text: str
    reasoning_parser: Annotated[str, one_of(*REASONING_FORMATS)] | None = None


class ParserRoutes:
    """Without a parser named in the request, the server's own."""

    def __init__(self, config: ServerConfig, answers: AnswerFormat) -> None:
        self._answers = answers
        self._max_body_bytes = int(config.max_body_mb * 1e6)

    def table(self) -> list[Endpoint]:
        calls, thoughts = self.parse_function_call, self.separate_reasoning
        rows: list[tuple[str, Handler, str, Any, Any]] = [
            ("/parse_function_call", calls, "Find calls in a text", CallsBody, FoundCalls),
            ("/function_call", calls, "Find calls in a text", CallsBody, FoundCalls),
            ("/separate_reasoning", thoughts, "Find thoughts", ThoughtsBody, FoundThoughts),
        ]
        return [
            Endpoint("POST", path, Level.API, handler, summary, body=body, answer=answer)
            for path, handler, summary, body, answer in rows
        ]

    async def parse_function_call(self, request: web.Request) -> web.StreamResponse:
        body = convert(await self._fields(request), CallsBody)
        check_tools(body.tools)
        places = {tool.function.name: place for place, tool in enumerate(body.tools)}
        form = _known(
            "tool_call_parser",
            body.tool_call_parser,
            self._answers.tools,
            TOOL_FORMATS,
            TOOL_PARSER_SPELLINGS,
        )
        parser = form.make_parser(places, HOLD_CHARS)
        parts = _parts(AnswerReader(calls=parser), body.text)
        calls: list[dict[str, Any]] = []
        for part in parts:
            match part:
                case CallBegun():
                    place = places[part.name]
                    calls.append({"tool_index": place, "name": part.name, "parameters": ""})
                case Arguments():
                    calls[part.index]["parameters"] += part.text
        return json_response({"normal_text": _content(parts), "calls": calls})

    async def separate_reasoning(self, request: web.Request) -> web.StreamResponse:
        body = convert(await self._fields(request), ThoughtsBody)
        form = _known(
            "reasoning_parser",
            body.reasoning_parser,
            self._answers.reasoning,
            REASONING_FORMATS,
            REASONING_PARSER_SPELLINGS,
        )
        parser = ReasoningParser(thinking_after("", form))
        parts = _parts(AnswerReader(thoughts=parser), body.text)
        thoughts = "".join(part.text for part in parts if isinstance(part, Thought))
        return json_response({"reasoning_text": thoughts, "text": _content(parts)})

    async def _fields(self, request: web.Request) -> dict[str, Any]:
        return parse_fields(await read_body(request, self._max_body_bytes))


def _known(
    param: str,
    name: str | None,
    own: T | None,
    formats: Mapping[str, T],
    spellings: Mapping[str, str],
) -> T:
    """The format that a request names, or the server's own; raises InvalidRequestError."""
    known = own if name is None else formats.get(spellings.get(name, name))
    if known is None:
        raise InvalidRequestError(f"{param} must be one of {', '.join(formats)}", param=param)
    return known


def _parts(reader: AnswerReader, text: str) -> list[Part]:
    """Raises InvalidRequestError where that would keep others waiting."""
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidRequestError(
            f"text has {len(text)} characters, at most {MAX_TEXT_CHARS} are read", param="text"
        )
    return reader.whole(text)


def _content(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))
