"""`/v1/completions`: a JSON object to a call."""

from __future__ import annotations

from dataclasses import dataclass

from sgl.errors import InvalidRequestError
from sgl.messages import LogprobOptions
from sgl.protocol.body import (
    NumTopLogprobs,
    check_num_prompts,
    convert,
    id_array,
    parse_fields,
    refuse_unsupported,
)
from sgl.protocol.call import GenerationCall, Prompt, PromptCall
from sgl.protocol.openai import (
    NOT_YET,
    Frame,
    SamplingBody,
    Server,
    frame,
    namespace,
    sampling_params,
)
from sgl.protocol.openai_grammar import grammar_of

DEFAULT_MAX_TOKENS = 16


class CompletionBody(SamplingBody, kw_only=True):
    """The fields of `/v1/completions` besides the shared ones.

    prompt      a text, ids, or a list of either
    max_tokens  of an answer; 16 if not given
    echo        the text begins with the prompt
    logprobs    of each token, and of so many of the likeliest ones in its place
    best_of     must be n: all that is generated is returned
    suffix      not supported: must be empty
    """

    prompt: str | list[str | int | list[int]]
    echo: bool | None = False
    logprobs: NumTopLogprobs | None = None
    best_of: int | None = None
    suffix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A call, and what its response should look like."""

    call: GenerationCall
    frame: Frame
    has_echo: bool


def parse_completion(body: bytes, server: Server) -> CompletionRequest:
    """The request in the body of a POST; raises InvalidRequestError."""
    fields = parse_fields(body)
    refuse_unsupported(fields, NOT_YET)
    completion = convert(fields, CompletionBody)
    _check(completion)
    prompts = prompts_in(completion.prompt, "prompt")
    check_num_prompts(prompts, server.max_prompts, "prompt")
    head = frame(completion, server, "cmpl")
    sampling = sampling_params(
        completion,
        max_new_tokens=DEFAULT_MAX_TOKENS
        if completion.max_tokens is None
        else completion.max_tokens,
    )
    grammar = grammar_of(completion)
    calls = tuple(
        PromptCall(
            prompt=prompt,
            sampling=sampling,
            logprobs=_logprob_options(completion),
            rid=head.id if len(prompts) == 1 else f"{head.id}-{number}",
            is_length_explicit=completion.max_tokens is not None,
            grammar=grammar,
        )
        for number, prompt in enumerate(prompts)
    )
    call = GenerationCall(
        prompts=calls,
        n=sampling.n,
        stream=bool(completion.stream),
        namespace=namespace(completion),
    )
    return CompletionRequest(call=call, frame=head, has_echo=bool(completion.echo))


def _check(body: CompletionBody) -> None:
    if body.suffix:
        raise InvalidRequestError("suffix is not supported by this server", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(
            "best_of must be equal to n: this server returns all it generates", param="best_of"
        )


def prompts_in(value: str | list[str | int | list[int]], field: str) -> list[Prompt]:
    """The texts and ids that a field holds; raises InvalidRequestError if there are none."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequestError(
            f"{field} must be a text, a list of texts or token ids", param=field
        )
    if isinstance(value[0], int):
        return [id_array(value, field)]
    if isinstance(value[0], str):
        return [_text(item, field) for item in value]
    return [id_array(item, field) for item in value]


def _text(item: object, field: str) -> str:
    if not isinstance(item, str):
        raise InvalidRequestError(f"{field} mixes texts and token ids", param=field)
    return item


def _logprob_options(body: CompletionBody) -> LogprobOptions | None:
    if body.logprobs is None:
        return None
    return LogprobOptions(start_len=0 if body.echo else -1, top_num=body.logprobs)
