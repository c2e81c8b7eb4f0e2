"""`/encode` and `/classify`: a JSON object to a call, and vectors as they tell them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgl.errors import InvalidRequestError
from sgl.protocol.body import convert, parse_fields, refuse_unsupported
from sgl.protocol.call import Answer, GenerationCall, Prompt, PromptCall
from sgl.protocol.native import PromptBody, namespace_of, prompts_of, rids_of
from sgl.protocol.native_reply import finish_reason
from sgl.sampling_params import NO_TOKENS

NOT_YET = (
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "lora_path",
    "session_params",
)


class EncodeBody(PromptBody, kw_only=True):
    """The fields of both paths and their JSON types; null means not given.

    text                what to make a vector of; a list gives a list of answers, in order
    stream              a vector comes whole: must be false
    add_special_tokens  a text gets the tokens that begin and end one
    """

    stream: bool | None = False
    add_special_tokens: bool | None = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeRequest:
    """A call, and whether its response is an array: the prompt was a list."""

    call: GenerationCall
    is_array: bool


def parse_encode(body: bytes, max_prompts: int | None = None) -> EncodeRequest:
    """The request in the body of a POST; raises InvalidRequestError."""
    return encode_request(parse_fields(body), max_prompts)


def encode_request(fields: Mapping[str, Any], max_prompts: int | None = None) -> EncodeRequest:
    """The request these JSON values describe; raises InvalidRequestError."""
    refuse_unsupported(fields, NOT_YET)
    body = convert(fields, EncodeBody)
    if body.stream:
        raise InvalidRequestError(
            "a vector comes whole: stream must be false, or left out", param="stream"
        )
    prompts, is_batch = prompts_of(body, max_prompts)
    call = vector_call(
        prompts,
        rids_of(body, len(prompts) if is_batch else None),
        field="input_ids" if body.text is None else "text",
        add_special_tokens=body.add_special_tokens is not False,
        namespace=namespace_of(body),
    )
    return EncodeRequest(call=call, is_array=is_batch)


def vector_call(
    prompts: Sequence[Prompt],
    rids: Iterable[str],
    *,
    field: str,
    add_special_tokens: bool,
    namespace: str,
) -> GenerationCall:
    """A call for a vector of each prompt; those of `field` must not be empty texts."""
    if "" in prompts:
        raise InvalidRequestError(f"{field} holds an empty text", param=field)
    return GenerationCall(
        prompts=tuple(
            PromptCall(prompt=prompt, sampling=NO_TOKENS, rid=rid)
            for prompt, rid in zip(prompts, rids, strict=True)
        ),
        add_special_tokens=add_special_tokens,
        namespace=namespace,
        wants_vectors=True,
    )


class EncodeReply:
    """Vectors as `/encode` and `/classify` tell them; null where one was aborted by its rid.

    They are arrays of float32, whose JSON is the shortest; lists with `is_plain`.
    """

    def __init__(self, request: EncodeRequest, *, is_plain: bool = False) -> None:
        self._is_array = request.is_array
        self._is_plain = is_plain

    def whole(self, answers: Sequence[Answer]) -> Any:
        items = [self._item(answer) for answer in answers]
        return items if self._is_array else items[0]

    def _item(self, answer: Answer) -> dict[str, Any]:
        meta = {
            "id": answer.rid,
            "finish_reason": answer.finish and finish_reason(answer.finish),
            "prompt_tokens": len(answer.prompt_ids),
            "cached_tokens": answer.num_cached,
        }
        return {"embedding": self._vector(answer), "meta_info": meta}

    def _vector(self, answer: Answer) -> Any:
        if not answer.vector:
            return None
        vector = np.frombuffer(answer.vector, np.float32)
        return vector.tolist() if self._is_plain else vector
