"""Answers as `/generate` tells them.

Streams tell the whole text so far in every event, unless the server runs with `--stream-output`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl.errors import RequestError
from sgl.messages import Finish, LogprobOptions
from sgl.protocol.answers import FinishReason, GeneratedText, NativeError
from sgl.protocol.call import Answer, LogprobColumns, Vocabulary
from sgl.protocol.native import GenerateRequest

Row = list[float | int | str | None]  # [log-probability, id, text]
_CONTINUATIONS = {bytes([byte]) for byte in range(0x80, 0xC0)}  # of a character of UTF-8


def native_error(error: RequestError) -> NativeError:
    return {"error": {"message": str(error)}}


@dataclass(slots=True)
class _Sent:
    """What a response has told of one answer already; its rows are made only once."""

    num_chars: int = 0
    num_ids: int = 0
    rows: dict[str, list[Any]] = field(default_factory=dict)


class NativeReply:
    """Answers as `/generate` tells them; `is_disjoint` streams only what is new."""

    def __init__(
        self, request: GenerateRequest, vocabulary: Vocabulary | None, *, is_disjoint: bool = False
    ) -> None:
        self._is_array = request.is_array
        self._texts = vocabulary if request.has_token_texts else None
        self._vocabulary = vocabulary if request.has_token_ids else None
        self._is_disjoint = is_disjoint
        self._sent: dict[int, _Sent] = {}

    def whole(self, answers: Sequence[Answer]) -> Any:
        items = [
            self._item(answer, answer.text, answer.output_ids.tolist(), _Sent())
            for answer in answers
        ]
        return items if self._is_array else items[0]

    def opening(self, answers: Sequence[Answer]) -> list[Any]:
        return []

    def progress(self, answer: Answer) -> list[Any]:
        sent = self._sent.setdefault(answer.index, _Sent())
        text, ids = answer.text[sent.num_chars :], answer.output_ids[sent.num_ids :].tolist()
        if self._is_disjoint:
            sent.num_chars, sent.num_ids = len(answer.text), len(answer.output_ids)
        item = self._item(answer, text, ids, sent)
        if self._is_array:
            item["index"] = answer.index
        return [item]

    def closing(self, answers: Sequence[Answer]) -> list[Any]:
        return []

    def error(self, error: RequestError) -> Any:
        return native_error(error)

    def _item(self, answer: Answer, text: str, ids: list[int], sent: _Sent) -> GeneratedText:
        return {"text": text, "output_ids": ids, "meta_info": self._meta(answer, sent)}

    def _meta(self, answer: Answer, sent: _Sent) -> Any:
        meta: dict[str, Any] = {
            "id": answer.rid,
            "finish_reason": answer.finish and finish_reason(answer.finish),
            "prompt_tokens": len(answer.prompt_ids),
            "completion_tokens": len(answer.output_ids),
            "cached_tokens": answer.num_cached,
        }
        if answer.logprob_options is not None:
            self._add_rows(answer, answer.logprob_options, sent.rows)
            meta |= {name: list(rows) for name, rows in sent.rows.items()}
        if self._vocabulary is not None and answer.finish is not None:
            meta |= _token_ids(answer, self._vocabulary)
        return meta

    def _add_rows(
        self, answer: Answer, options: LogprobOptions, rows: dict[str, list[Any]]
    ) -> None:
        """Append the rows of tokens that came since the last time."""
        prompt = answer.prompt_ids[options.start_len :] if options.start_len >= 0 else array("i")
        sides = (
            ("input", prompt, answer.input_logprobs),
            ("output", answer.output_ids, answer.output_logprobs),
        )
        for side, ids, columns in sides:
            tokens = rows.setdefault(f"{side}_token_logprobs", [])
            new = range(len(tokens), len(columns))
            tokens += [self._row(columns.value(i), ids[i]) for i in new]
            if options.top_num:
                top = rows.setdefault(f"{side}_top_logprobs", [])
                top += [self._top(columns, i, options.top_num) for i in new]
            if options.token_ids:
                chosen = rows.setdefault(f"{side}_token_ids_logprobs", [])
                chosen += [self._chosen(columns, i, options.token_ids) for i in new]

    def _row(self, value: float | None, token_id: int) -> Row:
        return [value, token_id, self._texts.token_text(token_id) if self._texts else None]

    def _top(self, columns: LogprobColumns, position: int, count: int) -> list[Row] | None:
        if columns.value(position) is None:
            return None
        return [self._row(value, token_id) for value, token_id in columns.top(position, count)]

    def _chosen(self, columns: LogprobColumns, position: int, packed: bytes) -> list[Row] | None:
        if columns.value(position) is None:
            return None
        ids = array("i", packed)
        values = columns.chosen(position, len(ids))
        return [self._row(value, token_id) for value, token_id in zip(values, ids, strict=True)]


def _token_ids(answer: Answer, vocabulary: Vocabulary) -> dict[str, Any]:
    """The prompt's tokens, and those of the answer that lie whole in its text.

    A stop string may end within a token, and tokens that end an answer are not text.
    """
    data, num_bytes, num_ids, end = answer.text.encode(), 0, 0, 0
    for index, token_id in enumerate(answer.output_ids):
        piece = vocabulary.token_bytes(token_id)
        if data[end : end + len(piece)] != piece:
            break
        end += len(piece)
        if data[end : end + 1] not in _CONTINUATIONS:
            num_ids, num_bytes = index + 1, end
    return {
        "prompt_token_ids": answer.prompt_ids.tolist(),
        "text_token_ids": answer.output_ids[:num_ids].tolist(),
        "text_token_chars": len(data[:num_bytes].decode()),
    }


def finish_reason(finish: Finish) -> FinishReason:
    match finish.kind:
        case "stop":
            return {"type": "stop", "matched": finish.matched}
        case "length":
            return {"type": "length", "length": finish.length}
        case "abort":
            return {
                "type": "abort",
                "message": finish.message,
                "status_code": finish.status,
                "err_type": "AbortError",
            }
