"""What the two `/v1` generation endpoints share: sampling fields, usage, errors, models."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sgl.errors import RequestError
from sgl.messages import Finish
from sgl.protocol.answer_format import AnswerFormat
from sgl.protocol.answers import ModelCard, ModelList, OpenAiError, Usage
from sgl.protocol.body import MAX_RID_CHARS, MAX_SALT_CHARS, Name, Salt, check_name
from sgl.protocol.call import Answer
from sgl.protocol.openai_grammar import GrammarBody
from sgl.sampling_params import (
    MAX_STOP_IDS,
    MAX_STOPS,
    Bias,
    BiasKeys,
    MinP,
    NumAnswers,
    NumTokens,
    Penalty,
    RepetitionPenalty,
    SamplingParams,
    Seed,
    StopText,
    Temperature,
    TokenId,
    TopK,
    TopP,
)

NOT_YET = (
    "lora_path",
    "session_params",
    "custom_logit_processor",
    "audio",
)


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream tells besides the answer.

    include_usage   a last event with the token counts
    """

    include_usage: bool | None = None


class SamplingBody(GrammarBody, kw_only=True):
    """Fields of both endpoints and their JSON types; null means not given.

    model         anything; the answer repeats it
    max_tokens    of an answer
    min_tokens    end-of-sequence and stop tokens are masked until so many are out
    stream        answer with server-sent events
    stream_options   what a stream tells besides
    user          not looked at
    rid           your name for the request, for /abort_request; drawn if not given
    cache_salt    prompts with different salts never share cached KV
    """

    model: Name | None = None
    max_tokens: NumTokens | None = None
    n: NumAnswers | None = 1
    temperature: Temperature | None = 1.0
    top_p: TopP | None = 1.0
    frequency_penalty: Penalty | None = 0.0
    presence_penalty: Penalty | None = 0.0
    logit_bias: Annotated[dict[str, Bias], BiasKeys] | None = None
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: TopK | None = -1
    min_p: MinP | None = 0.0
    min_tokens: NumTokens | None = 0
    repetition_penalty: RepetitionPenalty | None = 1.0
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)] | None = None
    no_stop_trim: bool | None = False
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    rid: Name | None = None
    cache_salt: Salt | None = None


_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "no_stop_trim",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


_OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


def sampling_params(body: SamplingBody, **fields: Any) -> SamplingParams:
    """The body's sampling fields; `fields` are those whose meaning differs by endpoint."""
    given = {name: getattr(body, name) for name in _SAME_NAME}
    given |= {"min_new_tokens": body.min_tokens}
    return SamplingParams.from_dict(given | fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What is the same in every event of a response."""

    id: str
    model: str
    created: int
    reports_cached: bool
    includes_usage: bool

    def around(self, kind: str, choices: list[Any], usage: Usage | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def usage(self, answers: Sequence[Answer], n: int) -> Usage:
        """Token counts; a prompt counts once, however many samples were drawn."""
        num_prompt = sum(len(answer.prompt_ids) for answer in answers[::n])
        num_completion = sum(len(answer.output_ids) for answer in answers)
        num_cached = sum(answer.num_cached for answer in answers[::n])
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": num_cached} if self.reports_cached else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What the formats need to know of the server."""

    model_name: str
    reports_cached: bool = False
    max_prompts: int | None = None
    answers: AnswerFormat = field(default_factory=AnswerFormat)


def frame(body: SamplingBody, server: Server, prefix: str) -> Frame:
    options = body.stream_options
    return Frame(
        id=check_name(body.rid, "rid", MAX_RID_CHARS)
        if body.rid
        else f"{prefix}-{uuid.uuid4().hex}",
        model=check_name(body.model, "model", MAX_RID_CHARS) if body.model else server.model_name,
        created=int(time.time()),
        reports_cached=server.reports_cached,
        includes_usage=bool(options and options.include_usage),
    )


def namespace(body: SamplingBody) -> str:
    salt = body.cache_salt
    return "" if salt is None else check_name(salt, "cache_salt", MAX_SALT_CHARS)


def stop_fields(finish: Finish | None) -> dict[str, Any]:
    """`finish_reason` and, as an extra, what was matched; null until the last token."""
    return {
        "finish_reason": finish and finish.kind,
        "matched_stop": finish and finish.matched,
    }


def openai_error(error: RequestError) -> OpenAiError:
    """The envelope of `error`, in this API's names of the fields."""
    message = str(error)
    for ours, theirs in _OPENAI_NAMES.items():
        message = message.replace(ours, theirs)
    param = _OPENAI_NAMES.get(error.param, error.param) if error.param else None
    return error_body(message, error.kind, param=param, code=error.code)


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> OpenAiError:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_card(name: str, created: int, context_len: int) -> ModelCard:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "sgl",
        "root": name,
        "parent": None,
        "max_model_len": context_len,
    }


def model_list(cards: Sequence[ModelCard]) -> ModelList:
    return {"object": "list", "data": list(cards)}
