"""Answers as `/v1/completions` tells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sgl.errors import RequestError
from sgl.protocol.answers import CompletionLogprobs
from sgl.protocol.call import Answer, LogprobColumns, Vocabulary
from sgl.protocol.openai import openai_error, stop_fields
from sgl.protocol.openai_completions import CompletionRequest

KIND = "text_completion"


class CompletionReply:
    """Answers as `/v1/completions` tells them."""

    def __init__(self, request: CompletionRequest, vocabulary: Vocabulary) -> None:
        self._frame = request.frame
        self._call = request.call
        self._has_echo = request.has_echo
        self._vocabulary = vocabulary
        self._sent: dict[int, _Sent] = {}

    def whole(self, answers: Sequence[Answer]) -> Any:
        choices = [self._choice(answer, _Sent()) for answer in answers]
        return self._frame.around(KIND, choices, self._frame.usage(answers, self._call.n))

    def opening(self, answers: Sequence[Answer]) -> list[Any]:
        return []

    def progress(self, answer: Answer) -> list[Any]:
        choice = self._choice(answer, self._sent.setdefault(answer.index, _Sent()))
        if not choice["text"] and not choice["logprobs"] and not answer.finish:
            return []
        return [self._frame.around(KIND, [choice], None)]

    def closing(self, answers: Sequence[Answer]) -> list[Any]:
        if not self._frame.includes_usage:
            return []
        return [self._frame.around(KIND, [], self._frame.usage(answers, self._call.n))]

    def error(self, error: RequestError) -> Any:
        return openai_error(error)

    def _choice(self, answer: Answer, sent: _Sent) -> dict[str, Any]:
        """What `answer` has gained since `sent`, which is moved on."""
        echo = self._echo(answer) if self._has_echo and not sent.is_open else ""
        logprobs = self._logprobs(answer, sent)
        text = echo + answer.text[sent.num_chars :]
        sent.is_open = True
        sent.num_chars = len(answer.text)
        return {
            "index": answer.index,
            "text": text,
            "logprobs": logprobs,
            **stop_fields(answer.finish),
        }

    def _echo(self, answer: Answer) -> str:
        prompt = self._call.prompts[answer.index // self._call.n].prompt
        if isinstance(prompt, str):
            return prompt
        return self._vocabulary.decode(prompt, skip_special_tokens=True)

    def _logprobs(self, answer: Answer, sent: _Sent) -> CompletionLogprobs | None:
        options = answer.logprob_options
        if options is None:
            return None
        table = _LogprobTable(self._vocabulary, options.top_num, sent.text_len)
        table.add(answer.prompt_ids, answer.input_logprobs, sent.num_inputs)
        table.add(answer.output_ids, answer.output_logprobs, sent.num_outputs)
        sent.num_inputs = len(answer.input_logprobs)
        sent.num_outputs = len(answer.output_logprobs)
        sent.text_len += sum(map(len, table.tokens))
        return table.as_json() if table.tokens else None


@dataclass(slots=True)
class _Sent:
    """What the response has told of one answer; `text_len` counts the texts of its tokens."""

    is_open: bool = False
    num_chars: int = 0
    num_inputs: int = 0
    num_outputs: int = 0
    text_len: int = 0


class _LogprobTable:
    """The parallel lists of the completions format."""

    def __init__(self, vocabulary: Vocabulary, top_num: int, text_len: int) -> None:
        self._vocabulary = vocabulary
        self._top_num = top_num
        self._text_len = text_len
        self.tokens: list[str] = []
        self._values: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []

    def add(self, ids: Sequence[int], columns: LogprobColumns, start: int) -> None:
        """Append the tokens from `start` on."""
        for position in range(start, len(columns)):
            self.tokens.append(self._vocabulary.token_text(ids[position]))
            self._values.append(columns.value(position))
            self._tops.append(self._top(columns, position))

    def as_json(self) -> CompletionLogprobs:
        lengths = map(len, self.tokens[:-1])
        return {
            "tokens": self.tokens,
            "token_logprobs": self._values,
            "top_logprobs": self._tops if self._top_num else None,
            "text_offset": list(accumulate(lengths, initial=self._text_len)),
        }

    def _top(self, columns: LogprobColumns, position: int) -> dict[str, float] | None:
        if columns.value(position) is None or not self._top_num:
            return None
        top: dict[str, float] = {}
        for value, token_id in columns.top(position, self._top_num):
            top.setdefault(self._vocabulary.token_text(token_id), value)  # the likelier one stays
        return top
