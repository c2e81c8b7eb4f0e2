"""`/generate`: a JSON object to a call.

A prompt may be one or a list; fields that belong to a prompt may then be lists of equal length.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from sgl.constrained.grammar import one_grammar
from sgl.errors import InvalidRequestError
from sgl.messages import LogprobOptions, pack
from sgl.protocol.body import (
    MAX_RID_CHARS,
    MAX_SALT_CHARS,
    Name,
    NumTopLogprobs,
    Salt,
    check_name,
    check_num_prompts,
    convert,
    id_array,
    parse_fields,
    refuse_unsupported,
)
from sgl.protocol.call import GenerationCall, Prompt, PromptCall
from sgl.protocol.sampling_schema import SamplingFields
from sgl.protocol.session import SessionParams
from sgl.sampling_params import MAX_STOPS, WRITTEN_KINDS, Grammar, SamplingParams

MAX_CHOSEN_IDS = 1024  # of token_ids_logprob
NOT_YET = (
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "lora_path",
    "custom_logit_processor",
)
NOT_YET_SAMPLING = ("custom_params",)

StartLen = Annotated[int, Meta(ge=-1)]

T = TypeVar("T")


class PromptBody(msgspec.Struct, kw_only=True):
    """Fields that say what the prompts are, and their JSON types; null means not given.

    input_ids    token ids instead of text
    rid          your name for a prompt, for /abort_request; drawn if not given
    cache_salt   prompts with different salts never share cached KV
    """

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    rid: Name | list[Name] | None = None
    cache_salt: Salt | None = None


class GenerateBody(PromptBody, kw_only=True):
    """The fields of `/generate` and their JSON types; null means not given.

    text                     the prompt; a list gives a list of answers, in order
    sampling_params          how to go on; a list has one for each prompt
    return_logprob           tell log-probabilities; they are of the model's own distribution
    logprob_start_len        of the prompt too, from this position on; -1: of the answer only
    top_logprobs_num         and of so many of the likeliest tokens in each place
    token_ids_logprob        and of these ids, at most 1024, in each place
    return_text_in_logprobs  tell the texts of these tokens
    return_hidden_states     not supported: must be false
    return_token_ids         tell the prompt's tokens, and those of the text
    prefix_ids               tokens that the text goes on from, such as those of an earlier answer
    stream                   answer with server-sent events
    session_params           where in a session a prompt goes on; a list has one for each prompt
    """

    sampling_params: SamplingFields | list[SamplingFields] | None = None
    return_logprob: bool | list[bool] | None = False
    logprob_start_len: StartLen | list[StartLen] | None = -1
    top_logprobs_num: NumTopLogprobs | list[NumTopLogprobs] | None = 0
    token_ids_logprob: list[int | list[int]] | None = None
    return_text_in_logprobs: bool | None = False
    return_hidden_states: bool | None = False
    return_token_ids: bool | None = False
    prefix_ids: list[int | list[int]] | None = None
    stream: bool | None = False
    session_params: SessionParams | list[SessionParams | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A call, and what its response should look like.

    is_array  the response is an array: the prompt was a list, or n > 1
    """

    call: GenerationCall
    is_array: bool
    has_token_texts: bool
    has_token_ids: bool = False


def parse_generate(body: bytes, max_prompts: int | None = None) -> GenerateRequest:
    """The request in the body of a POST; raises InvalidRequestError."""
    return generate_request(parse_fields(body), max_prompts)


def generate_request(fields: Mapping[str, Any], max_prompts: int | None = None) -> GenerateRequest:
    """The request these JSON values describe; raises InvalidRequestError."""
    refuse_unsupported(fields, NOT_YET)
    body = convert(fields, GenerateBody)
    if body.return_hidden_states:
        refuse_unsupported({"return_hidden_states": True}, ["return_hidden_states"])
    prompts, is_batch = prompts_of(body, max_prompts)
    calls = _prompt_calls(body, prompts, is_batch)
    n = calls[0].sampling.n
    if any(call.sampling.n != n for call in calls):
        raise InvalidRequestError("n must be the same for all prompts of a batch", param="n")
    if n > 1 and any(call.session for call in calls):
        raise InvalidRequestError(
            "a request of a session has one answer, from which others go on: leave out n, or send "
            "several requests",
            param="n",
        )
    call = GenerationCall(
        prompts=calls,
        n=n,
        stream=bool(body.stream),
        namespace=namespace_of(body),
    )
    return GenerateRequest(
        call=call,
        is_array=is_batch or n > 1,
        has_token_texts=bool(body.return_text_in_logprobs),
        has_token_ids=bool(body.return_token_ids),
    )


def prompts_of(body: PromptBody, max_prompts: int | None) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they came as a list; raises InvalidRequestError."""
    prompts, is_batch = _prompts(body)
    check_num_prompts(prompts, max_prompts, "input_ids" if body.text is None else "text")
    if is_batch and isinstance(body.rid, str):
        raise InvalidRequestError("rid must be a list for a list of prompts", param="rid")
    return prompts, is_batch


def rids_of(body: PromptBody, num: int | None) -> list[str]:
    """The name of each prompt, "" where it has none; `num` is None where the prompt is no list."""
    rids: list[str] = _spread(body.rid, "", num, "rid")
    return [rid and check_name(rid, "rid", MAX_RID_CHARS) for rid in rids]


def namespace_of(body: PromptBody) -> str:
    salt = body.cache_salt
    return "" if salt is None else check_name(salt, "cache_salt", MAX_SALT_CHARS)


def _prompts(body: PromptBody) -> tuple[list[Prompt], bool]:
    if body.text is not None and body.input_ids is not None:
        raise InvalidRequestError("give either text or input_ids, not both", param="input_ids")
    if body.text is not None:
        return ([body.text], False) if isinstance(body.text, str) else (_some(body.text), True)
    if body.input_ids is None:
        raise InvalidRequestError("either text or input_ids must be given", param="text")
    ids = _some(body.input_ids, "input_ids")
    if isinstance(ids[0], int):
        return [id_array(ids, "input_ids")], False
    return [id_array(prompt, "input_ids") for prompt in ids], True


def _some(prompts: Sequence[T], field: str = "text") -> list[T]:
    if not prompts:
        raise InvalidRequestError(f"{field} must not be an empty list", param=field)
    return list(prompts)


def _prompt_calls(
    body: GenerateBody, prompts: list[Prompt], is_batch: bool
) -> tuple[PromptCall, ...]:
    num = len(prompts) if is_batch else None
    samplings = _samplings(body.sampling_params, num)
    rids = rids_of(body, num)
    sessions: list[SessionParams | None] = _spread(body.session_params, None, num, "session_params")
    logprobs = _logprob_options(body, num)
    prefixes = _prefixes(body, num)
    return tuple(
        PromptCall(
            prompt=prompt,
            sampling=sampling.params,
            logprobs=options,
            rid=rid,
            is_length_explicit=sampling.is_length_explicit,
            grammar=sampling.grammar,
            session=session,
            prefix_ids=prefix,
        )
        for prompt, sampling, options, rid, session, prefix in zip(
            prompts, samplings, logprobs, rids, sessions, prefixes, strict=True
        )
    )


class _Sampling(NamedTuple):
    """What `sampling_params` says: parameters, whether they name max_new_tokens, and a grammar."""

    params: SamplingParams
    is_length_explicit: bool
    grammar: Grammar | None


def _samplings(value: Any, num: int | None) -> list[_Sampling]:
    """For each prompt."""
    if isinstance(value, list):
        return [_sampling(fields) for fields in _spread(value, {}, num, "sampling_params")]
    one = _sampling(value or {})
    return [one] * (1 if num is None else num)


def _sampling(fields: dict[str, Any]) -> _Sampling:
    refuse_unsupported(fields, NOT_YET_SAMPLING)
    others = {*NOT_YET_SAMPLING, *WRITTEN_KINDS}
    known = {name: value for name, value in fields.items() if name not in others}
    stop = fields.get("stop")
    if isinstance(stop, list) and len(stop) > MAX_STOPS:
        raise InvalidRequestError(
            f"stop must have at most {MAX_STOPS} strings, got {len(stop)}", param="stop"
        )
    is_explicit = fields.get("max_new_tokens") is not None
    return _Sampling(SamplingParams.from_dict(known), is_explicit, one_grammar(fields))


def _spread(value: Any, default: Any, num: int | None, field: str) -> list[Any]:
    """A value for each prompt; `num` is None where the prompt is no list."""
    if not isinstance(value, list):
        return [default if value is None else value] * (1 if num is None else num)
    if num is None:
        raise InvalidRequestError(f"{field} may be a list only if the prompt is one", param=field)
    if len(value) != num:
        raise InvalidRequestError(
            f"{field} has {len(value)} entries for {num} prompts", param=field
        )
    return value


def _logprob_options(body: GenerateBody, num: int | None) -> list[LogprobOptions | None]:
    wanted: list[bool] = _spread(body.return_logprob, False, num, "return_logprob")
    starts: list[int] = _spread(body.logprob_start_len, -1, num, "logprob_start_len")
    tops: list[int] = _spread(body.top_logprobs_num, 0, num, "top_logprobs_num")
    chosen = _chosen_ids(body.token_ids_logprob, num)
    return [
        _checked_options(start, top, ids) if is_wanted else None
        for is_wanted, start, top, ids in zip(wanted, starts, tops, chosen, strict=True)
    ]


def _chosen_ids(value: list[int | list[int]] | None, num: int | None) -> list[list[int]]:
    """`token_ids_logprob` is itself a list: one of integers is meant for every prompt."""
    if not value or isinstance(value[0], int):
        return [value or []] * (1 if num is None else num)  # type: ignore[list-item]
    return _spread(value, [], num, "token_ids_logprob")


def _prefixes(body: GenerateBody, num: int | None) -> list[array[int] | None]:
    """`prefix_ids` is itself a list: one of integers is meant for every prompt."""
    value = body.prefix_ids
    if not value:
        return [None] * (1 if num is None else num)
    if body.text is None or body.session_params is not None:
        raise InvalidRequestError(
            "prefix_ids come before a text: leave out input_ids and session_params",
            param="prefix_ids",
        )
    if isinstance(value[0], int):
        return [id_array(value, "prefix_ids")] * (1 if num is None else num)
    many: list[list[int]] = _spread(value, [], num, "prefix_ids")
    return [id_array(ids, "prefix_ids") if ids else None for ids in many]


def _checked_options(start_len: int, top_num: int, token_ids: list[int]) -> LogprobOptions:
    if len(token_ids) > MAX_CHOSEN_IDS:
        raise InvalidRequestError(
            f"token_ids_logprob may name {MAX_CHOSEN_IDS} ids, got {len(token_ids)}",
            param="token_ids_logprob",
        )
    packed = pack(id_array(token_ids, "token_ids_logprob")) if token_ids else b""
    return LogprobOptions(start_len=start_len, top_num=top_num, token_ids=packed)
