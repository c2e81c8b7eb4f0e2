"""Answers as `/v1/chat/completions` tells them: messages, or deltas of messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from sgl.errors import RequestError
from sgl.messages import Finish
from sgl.protocol.answer_format import AnswerReader
from sgl.protocol.answer_parts import Arguments, CallBegun, Content, Part, Thought, joined
from sgl.protocol.call import Answer, LogprobColumns, Vocabulary
from sgl.protocol.openai import openai_error, stop_fields
from sgl.protocol.openai_chat import ChatRequest

KIND, CHUNK_KIND = "chat.completion", "chat.completion.chunk"


@dataclass(slots=True)
class _Sent:
    """What a stream has told of one answer, and who reads the rest."""

    reader: AnswerReader
    num_chars: int = 0
    num_logprobs: int = 0


class ChatReply:
    """Answers as `/v1/chat/completions` tells them."""

    def __init__(self, request: ChatRequest, vocabulary: Vocabulary) -> None:
        self._frame = request.frame
        self._n = request.call.n
        self._reading = request.reading
        self._vocabulary = vocabulary
        self._sent: dict[int, _Sent] = {}

    def whole(self, answers: Sequence[Answer]) -> Any:
        choices = [self._choice(answer) for answer in answers]
        return self._frame.around(KIND, choices, self._frame.usage(answers, self._n))

    def opening(self, answers: Sequence[Answer]) -> list[Any]:
        content = "" if self._reading.is_plain else None  # there may never be any
        return [
            self._chunk(answer.index, {"role": "assistant", "content": content})
            for answer in answers
        ]

    def progress(self, answer: Answer) -> list[Any]:
        sent = self._sent.get(answer.index)
        if sent is None:
            sent = self._sent[answer.index] = _Sent(self._reading.reader())
        parts = sent.reader.feed(answer.text[sent.num_chars :])
        sent.num_chars = len(answer.text)
        if answer.finish:
            parts += sent.reader.finish()
        deltas = [self._delta(part) for part in joined(parts)]
        has_logprobs = len(answer.output_logprobs) > sent.num_logprobs
        if not deltas and not has_logprobs and not answer.finish:
            return []
        if not deltas:
            deltas = [{"content": ""} if has_logprobs and self._reading.is_plain else {}]
        chunks = [self._chunk(answer.index, delta) for delta in deltas]
        if has_logprobs:
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(answer, sent.num_logprobs)
        chunks[-1]["choices"][0] |= _stop_fields(answer.finish, has_calls=sent.reader.has_calls)
        sent.num_logprobs = len(answer.output_logprobs)
        return chunks

    def closing(self, answers: Sequence[Answer]) -> list[Any]:
        if not self._frame.includes_usage:
            return []
        return [self._frame.around(CHUNK_KIND, [], self._frame.usage(answers, self._n))]

    def error(self, error: RequestError) -> Any:
        return openai_error(error)

    def _choice(self, answer: Answer) -> dict[str, Any]:
        reader = self._reading.reader()
        parts = reader.whole(answer.text)
        return {
            "index": answer.index,
            "message": self._message(parts),
            "logprobs": self._logprobs(answer, 0),
            **_stop_fields(answer.finish, has_calls=reader.has_calls),
        }

    def _message(self, parts: Sequence[Part]) -> dict[str, Any]:
        content = "".join(part.text for part in parts if isinstance(part, Content))
        thoughts = "".join(part.text for part in parts if isinstance(part, Thought))
        calls: list[dict[str, Any]] = []
        for part in parts:
            match part:
                case CallBegun():
                    calls.append(self._call(part))
                case Arguments():
                    calls[part.index]["function"]["arguments"] += part.text
        return {
            "role": "assistant",
            "content": content or (None if calls or thoughts else ""),
            "reasoning_content": thoughts or None,
            "tool_calls": calls or None,
        }

    def _delta(self, part: Part) -> dict[str, Any]:
        match part:
            case Content():
                return {"content": part.text}
            case Thought():
                return {"reasoning_content": part.text}
            case CallBegun():
                return {"tool_calls": [{"index": part.index, **self._call(part)}]}
            case Arguments():
                function = {"arguments": part.text}
                return {"tool_calls": [{"index": part.index, "function": function}]}
            case _:
                assert_never(part)

    def _call(self, begun: CallBegun) -> dict[str, Any]:
        function = {"name": begun.name, "arguments": ""}
        return {"id": self._reading.new_id(), "type": "function", "function": function}

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


def _stop_fields(finish: Finish | None, *, has_calls: bool) -> dict[str, Any]:
    """An answer that ended by itself and has calls ended because of them."""
    fields = stop_fields(finish)
    if has_calls and fields["finish_reason"] == "stop":
        fields["finish_reason"] = "tool_calls"
    return fields
