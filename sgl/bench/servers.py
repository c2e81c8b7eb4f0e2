"""One request to a server, timed: when it left, when each chunk of its answer came.

Every failure ends in `Answer.error`; nothing is raised, so that one request cannot end a run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from sgl.bench.backends import PATHS, BodyMaker
from sgl.bench.events import DONE, EventSplitter
from sgl.bench.prompts import Content, Turn

MAX_ERROR_CHARS = 300


@dataclass(slots=True)
class Answer:
    """What came back; times are seconds of `time.perf_counter`.

    chunk_times  arrival of each chunk that brought tokens; empty where nothing was streamed
    end_s        arrival of the last chunk of the answer, or of the failure
    num_input, num_output, num_cached    tokens, None where the server does not tell
    error        why it failed; empty if it did not
    """

    sent_s: float = 0.0
    end_s: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    num_input: int | None = None
    num_output: int | None = None
    num_cached: int | None = None
    text: str = ""
    error: str = ""
    has_finish: bool = False


class AnswerError(Exception):
    """The server refused, failed or broke off; the message says how."""


class Client:
    """Sends requests of one kind to one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, maker: BodyMaker) -> None:
        self._session = session
        self._url = url + PATHS[maker.backend.api]
        self._maker = maker
        self._take = _take_native if maker.backend.api == "native" else _take_openai

    async def ask(self, content: Content, turn: Turn) -> Answer:
        """One request for the answer to `turn`; `content` is its prompt as it is to be sent."""
        body = self._maker.body(content, turn.output_len, turn.schema)
        answer = Answer(sent_s=time.perf_counter())
        try:
            async with self._session.post(
                self._url, data=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    raise AnswerError(
                        f"status {response.status}: {error_text(await response.read())}"
                    )
                if response.content_type == "text/event-stream":
                    await self._read_stream(response, answer)
                else:
                    self._read_event(await response.read(), answer, is_chunk=False)
        except AnswerError as error:
            answer.error = str(error)
        except TimeoutError:
            answer.error = "no answer within --request-timeout"
        except aiohttp.ClientPayloadError:
            answer.error = "the connection broke off before the answer was complete"
        except (aiohttp.ClientError, OSError) as error:
            answer.error = f"the connection failed: {str(error) or type(error).__name__}"
        if answer.error or not answer.end_s:
            answer.end_s = time.perf_counter()
        return answer

    async def _read_stream(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        splitter = EventSplitter()
        is_done = False
        async for piece in response.content.iter_any():
            for event in splitter.feed(piece):
                is_done = is_done or event == DONE
                if not is_done:
                    self._read_event(event, answer, is_chunk=True)
        for event in splitter.close():
            is_done = is_done or event == DONE
            if not is_done:
                self._read_event(event, answer, is_chunk=True)
        if not is_done and not answer.has_finish:
            raise AnswerError("the stream broke off before the answer was complete")

    def _read_event(self, data: bytes, answer: Answer, *, is_chunk: bool) -> None:
        """Take in one event, or the whole body where nothing is streamed."""
        now = time.perf_counter()
        try:
            fields = orjson.loads(data)
            if fields.get("error"):
                raise AnswerError(error_text(data))
            has_tokens = self._take(fields, answer)
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = data[:MAX_ERROR_CHARS].decode("utf-8", "replace")
            raise AnswerError(f"the answer is not what this --backend sends: {shown}") from None
        if has_tokens is None:
            return
        answer.end_s = now
        if has_tokens and is_chunk:
            answer.chunk_times.append(now)


def _take_native(fields: Mapping[str, Any], answer: Answer) -> bool | None:
    """Take in an event of `/generate`; whether it brought tokens."""
    meta = fields["meta_info"]
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        raise AnswerError(f"aborted: {finish.get('message') or 'no reason given'}")
    num_output = meta.get("completion_tokens")
    text = fields.get("text") or ""
    has_tokens = len(text) > len(answer.text)
    if num_output is not None:
        has_tokens = num_output > (answer.num_output or 0)
        answer.num_output = num_output
    # servers send all text so far, or (--stream-output) only what is new
    answer.text = text if text.startswith(answer.text) else answer.text + text
    answer.num_input = meta.get("prompt_tokens", answer.num_input)
    answer.num_cached = meta.get("cached_tokens", answer.num_cached)
    answer.has_finish = finish is not None
    return has_tokens


def _take_openai(fields: Mapping[str, Any], answer: Answer) -> bool | None:
    """Take in an event of `/v1/…`; whether it brought tokens, None if it is about something else.

    There are no token counts in it, so a chunk brings tokens if it brings text.
    """
    if usage := fields.get("usage"):
        answer.num_input = usage.get("prompt_tokens", answer.num_input)
        answer.num_output = usage.get("completion_tokens", answer.num_output)
        details = usage.get("prompt_tokens_details") or {}
        answer.num_cached = details.get("cached_tokens", answer.num_cached)
    if not fields["choices"]:
        return None
    choice = fields["choices"][0]
    message = choice.get("delta") or choice.get("message") or choice
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    text = message.get("content") or message.get("text") or ""
    answer.text += text
    answer.has_finish = answer.has_finish or bool(choice.get("finish_reason"))
    return bool(text or thought)


def error_text(body: bytes) -> str:
    """The message in an error's JSON, in any of the shapes servers give it."""
    try:
        error = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body[:MAX_ERROR_CHARS].decode("utf-8", "replace").strip() or "no reason given"
    for name in ("error", "message", "detail"):
        if isinstance(error, dict) and error.get(name):
            error = error[name]
    return str(error)[:MAX_ERROR_CHARS]
