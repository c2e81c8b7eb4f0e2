"""What a client asked for, and the answers it will get: the values between HTTP and the engine.

body ── native, openai_* ──▶ GenerationCall ── front ──▶ engine
JSON ◀── native, openai_* ── Answer, one for each sample of each prompt ◀── front
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from sgl.errors import EngineError, InvalidRequestError, OverloadedError, RequestError
from sgl.messages import Finish, LogprobOptions, Logprobs, TextDelta
from sgl.protocol.session import SessionParams
from sgl.sampling_params import Grammar, SamplingParams

Prompt: TypeAlias = "str | array[int]"
# ends that are told in the answer, with HTTP status 200; other aborts are failures
CLIENT_ABORT_STATUS = 499  # the client asked for it
ABSENT_STATUS = 404  # there is no such session, or no such request in it
CONFLICT_STATUS = 409  # the request to go on from still runs
_TOLD_IN_ANSWER = (CLIENT_ABORT_STATUS, ABSENT_STATUS, CONFLICT_STATUS)


class Vocabulary(Protocol):
    """What the formats need of a tokenizer."""

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCall:
    """One prompt and how to go on from it.

    rid                 the client's name for it, usable in an abort; "" lets the server choose one
    is_length_explicit  the client named max_new_tokens: refuse what cannot fit instead of clipping
    grammar             what the answer must match
    kept_ids            special tokens that leave text even if the others do not
    session             where it goes on in a session; the prompt follows on what was said there
    prefix_ids          tokens that the prompt, a text, goes on from
    """

    prompt: Prompt
    sampling: SamplingParams
    logprobs: LogprobOptions | None = None
    rid: str = ""
    is_length_explicit: bool = False
    grammar: Grammar | None = None
    kept_ids: tuple[int, ...] = ()
    session: SessionParams | None = None
    prefix_ids: array[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCall:
    """One request of a client: prompts, each to be continued `n` times.

    namespace       prompts of different namespaces never share cached KV
    wants_vectors   one of each prompt, and no continuation
    """

    prompts: tuple[PromptCall, ...]
    n: int = 1
    stream: bool = False
    add_special_tokens: bool = True
    namespace: str = ""
    wants_vectors: bool = False


@dataclass(slots=True)
class LogprobColumns:
    """Log-probabilities of consecutive tokens, growing; the columns of `messages.Logprobs`."""

    values: array[float] = field(default_factory=lambda: array("f"))
    top_values: array[float] = field(default_factory=lambda: array("f"))
    top_ids: array[int] = field(default_factory=lambda: array("i"))
    chosen_values: array[float] = field(default_factory=lambda: array("f"))

    def __len__(self) -> int:
        return len(self.values)

    def add(self, more: Logprobs) -> None:
        self.values.frombytes(more.values)
        self.top_values.frombytes(more.top_values)
        self.top_ids.frombytes(more.top_ids)
        self.chosen_values.frombytes(more.chosen_values)

    def value(self, position: int) -> float | None:
        """None where there is none: nothing comes before the first token of a prompt."""
        value = self.values[position]
        return None if value != value else value

    def top(self, position: int, count: int) -> list[tuple[float, int]]:
        """The `count` likeliest tokens at a position, best first."""
        start = position * count
        span = slice(start, start + count)
        return list(zip(self.top_values[span], self.top_ids[span], strict=True))

    def chosen(self, position: int, count: int) -> array[float]:
        """Values of the `count` ids the client named, at a position."""
        return self.chosen_values[position * count : (position + 1) * count]


@dataclass(slots=True)
class Answer:
    """One continuation, growing until `finish` is set.

    index      its place in the call, prompt by prompt: prompt * n + sample
    rid        its name in the response; with n > 1, the prompt's with the sample's number
    vector     float32 bytes, in place of text and tokens where the call wanted vectors
    """

    index: int
    rid: str
    prompt_ids: array[int]
    logprob_options: LogprobOptions | None = None
    text: str = ""
    output_ids: array[int] = field(default_factory=lambda: array("i"))
    num_cached: int = 0
    finish: Finish | None = None
    vector: bytes = b""
    input_logprobs: LogprobColumns = field(default_factory=LogprobColumns)
    output_logprobs: LogprobColumns = field(default_factory=LogprobColumns)

    def add(self, delta: TextDelta) -> None:
        self.text += delta.text
        self.output_ids.frombytes(delta.token_ids)
        self.num_cached = max(self.num_cached, delta.num_cached)
        self.finish = delta.finish or self.finish
        self.vector = delta.vector
        for logprobs in delta.input_logprobs:
            self.input_logprobs.add(logprobs)
        for logprobs in delta.output_logprobs:
            self.output_logprobs.add(logprobs)

    @property
    def failure(self) -> RequestError | None:
        """The error that ended it, unless it ended well or in a way that the answer tells."""
        finish = self.finish
        if finish is None or finish.kind != "abort" or finish.status in _TOLD_IN_ANSWER:
            return None
        match finish.status:
            case 400:
                return InvalidRequestError(finish.message)
            case 429 | 503:
                return OverloadedError(finish.message)
            case _:
                return EngineError(finish.message)


class WholeReply(Protocol):
    """One client's response in its API's shape."""

    def whole(self, answers: Sequence[Answer]) -> Any:
        """The JSON of a finished call, in which arrays may be those of numpy."""


class Reply(WholeReply, Protocol):
    """One that can be streamed; remembers what a stream has sent already."""

    def opening(self, answers: Sequence[Answer]) -> list[Any]:
        """Events of a stream before the first token."""

    def progress(self, answer: Answer) -> list[Any]:
        """Events that tell what `answer` gained since it was last given here."""

    def closing(self, answers: Sequence[Answer]) -> list[Any]:
        """Events of a stream after the last token."""

    def error(self, error: RequestError) -> Any:
        """The JSON that tells of an error."""
