"""Answers as `/v1/chat/completions` tells them: messages, or deltas of messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgl.errors import RequestError
from sgl.protocol.call import Answer, LogprobColumns, Vocabulary
from sgl.protocol.openai import openai_error, stop_fields
from sgl.protocol.openai_chat import ChatRequest

KIND, CHUNK_KIND = "chat.completion", "chat.completion.chunk"


@dataclass(slots=True)
class _Sent:
    """What a stream has told of one answer."""

    num_chars: int = 0
    num_logprobs: int = 0


class ChatReply:
    """Answers as `/v1/chat/completions` tells them."""

    def __init__(self, request: ChatRequest, vocabulary: Vocabulary) -> None:
        self._frame = request.frame
        self._n = request.call.n
        self._vocabulary = vocabulary
        self._sent: dict[int, _Sent] = {}

    def whole(self, answers: Sequence[Answer]) -> Any:
        choices = [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "tool_calls": None},
                "logprobs": self._logprobs(answer, 0),
                **stop_fields(answer.finish),
            }
            for answer in answers
        ]
        return self._frame.around(KIND, choices, self._frame.usage(answers, self._n))

    def opening(self, answers: Sequence[Answer]) -> list[Any]:
        return [
            self._chunk(answer.index, {"role": "assistant", "content": ""}) for answer in answers
        ]

    def progress(self, answer: Answer) -> list[Any]:
        sent = self._sent.setdefault(answer.index, _Sent())
        text = answer.text[sent.num_chars :]
        has_logprobs = len(answer.output_logprobs) > sent.num_logprobs
        if not text and not has_logprobs and not answer.finish:
            return []
        chunk = self._chunk(answer.index, {"content": text} if text or has_logprobs else {})
        chunk["choices"][0] |= {
            "logprobs": self._logprobs(answer, sent.num_logprobs) if has_logprobs else None,
            **stop_fields(answer.finish),
        }
        sent.num_chars, sent.num_logprobs = len(answer.text), len(answer.output_logprobs)
        return [chunk]

    def closing(self, answers: Sequence[Answer]) -> list[Any]:
        if not self._frame.includes_usage:
            return []
        return [self._frame.around(CHUNK_KIND, [], self._frame.usage(answers, self._n))]

    def error(self, error: RequestError) -> Any:
        return openai_error(error)

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, **stop_fields(None)}
        return self._frame.around(CHUNK_KIND, [choice], None)

    def _logprobs(self, answer: Answer, start: int) -> dict[str, Any] | None:
        """The tokens from `start` on."""
        options = answer.logprob_options
        if options is None:
            return None
        columns = answer.output_logprobs
        return {
            "content": [
                self._token(columns.value(position), answer.output_ids[position])
                | {"top_logprobs": self._top(columns, position, options.top_num)}
                for position in range(start, len(columns))
            ]
        }

    def _top(self, columns: LogprobColumns, position: int, count: int) -> list[dict[str, Any]]:
        return [self._token(value, token_id) for value, token_id in columns.top(position, count)]

    def _token(self, value: float | None, token_id: int) -> dict[str, Any]:
        return {
            "token": self._vocabulary.token_text(token_id),
            "bytes": list(self._vocabulary.token_bytes(token_id)),
            "logprob": value,
        }
