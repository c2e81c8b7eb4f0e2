"""The lines that a batch reads and writes, in OpenAI's format.

{"custom_id", "method", "url", "body"} ── LineParser ──▶ Line ── handler's parser ──▶ call
{"id", "custom_id", "response": {"status_code", "request_id", "body"}} ◀── LineAnswer
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any

import orjson

from sgl.errors import InvalidRequestError, RequestError
from sgl.protocol.body import check_name, check_nesting, json_kind
from sgl.protocol.openai import openai_error

MAX_LINES = 100_000
MAX_CUSTOM_ID_CHARS = 256

_ANSWERED = re.compile(rb'\{"id":"batch_req_[0-9a-f]{32}_([0-9]+)"')


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a batch's input: the body of a request, or what is wrong with it.

    number   1 for the first line of the file
    """

    number: int
    custom_id: str | None
    body: bytes = b""
    error: RequestError | None = None


class LineParser:
    """The lines of one batch, in order: it remembers each custom_id."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._custom_ids: set[str] = set()

    def parse(self, number: int, text: bytes) -> Line:
        try:
            fields = _object(text)
        except InvalidRequestError as error:
            return bad_line(number, None, error)
        custom_id = fields.get("custom_id")
        shown_id = custom_id[:MAX_CUSTOM_ID_CHARS] if isinstance(custom_id, str) else None
        try:
            self._check_custom_id(custom_id)
            return Line(number, shown_id, self._body(fields))
        except InvalidRequestError as error:
            return bad_line(number, shown_id, error)

    def _check_custom_id(self, custom_id: object) -> None:
        if not isinstance(custom_id, str):
            raise InvalidRequestError("custom_id must be given, a string", param="custom_id")
        check_name(custom_id, "custom_id", MAX_CUSTOM_ID_CHARS)
        if custom_id in self._custom_ids:
            raise InvalidRequestError(
                f"an earlier line has the custom_id {custom_id!r} already", param="custom_id"
            )
        self._custom_ids.add(custom_id)

    def _body(self, fields: dict[str, Any]) -> bytes:
        if fields.get("method", "POST") != "POST":
            raise InvalidRequestError('method must be "POST"', param="method")
        if fields.get("url") != self._endpoint:
            raise InvalidRequestError(
                f"url must be the endpoint of the batch, {self._endpoint}", param="url"
            )
        body = fields.get("body")
        if not isinstance(body, dict):
            raise InvalidRequestError(
                f"body must be a JSON object, got {json_kind(body)}", param="body"
            )
        check_nesting(body)
        return orjson.dumps(body)


def bad_line(number: int, custom_id: str | None, error: RequestError) -> Line:
    """A line that is told apart by its number, as its custom_id may be missing."""
    numbered = type(error)(f"line {number}: {error}", param=error.param)
    return Line(number, custom_id, error=numbered)


def _object(text: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"not a JSON object but {json_kind(fields)}")
    return fields


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What the handler of the endpoint would have sent for a line."""

    line: Line
    status: int
    body: Any

    @classmethod
    def of_error(cls, line: Line, error: RequestError) -> LineAnswer:
        return cls(line, error.status, openai_error(error))

    @property
    def is_good(self) -> bool:
        return self.status == 200

    def encode(self, batch_id: str) -> bytes:
        """A line of the output or the error file; its id tells which line it answers."""
        response = {
            "status_code": self.status,
            "request_id": uuid.uuid4().hex,
            "body": self.body,
        }
        answer = {
            "id": f"batch_req_{batch_id.removeprefix('batch_')}_{self.line.number}",
            "custom_id": self.line.custom_id,
            "response": response,
            "error": None,
        }
        return orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)


def answered_number(answer: bytes) -> int | None:
    """The number of the line that a line of an output file answers."""
    match = _ANSWERED.match(answer)
    return None if match is None else int(match[1])
