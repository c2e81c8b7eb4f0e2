"""`/v1/embeddings`: a JSON object to a call, and vectors as OpenAI's API tells them."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta

from sgl.errors import AbortedError, InvalidRequestError
from sgl.protocol.body import (
    MAX_RID_CHARS,
    MAX_SALT_CHARS,
    Name,
    Salt,
    check_name,
    check_num_prompts,
    convert,
    parse_fields,
    refuse_unsupported,
)
from sgl.protocol.call import Answer, GenerationCall
from sgl.protocol.encode import vector_call
from sgl.protocol.openai import NOT_YET, Server
from sgl.protocol.openai_completions import prompts_in

EncodingFormat: TypeAlias = Literal["float", "base64"]
Dimensions = Annotated[int, Meta(ge=1)]


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """The fields of `/v1/embeddings` and their JSON types; null means not given.

    input               a text, ids, or a list of either; none empty
    model               anything; the answer repeats it
    encoding_format     base64: of the little-endian float32 numbers, less than half as long
    dimensions          the first so many numbers, brought to length 1 again, if the model allows it
    user                not looked at
    rid                 your name for the request, for /abort_request; drawn if not given
    cache_salt          prompts with different salts never share cached KV
    add_special_tokens  a text gets the tokens that begin and end one
    """

    input: str | list[str | int | list[int]]
    model: Name | None = None
    encoding_format: EncodingFormat | None = "float"
    dimensions: Dimensions | None = None
    user: str | None = None
    rid: Name | None = None
    cache_salt: Salt | None = None
    add_special_tokens: bool | None = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingsRequest:
    """A call, and what its response should look like.

    dimensions   how many numbers of each vector are wanted; None: all
    """

    call: GenerationCall
    model: str
    encoding_format: EncodingFormat
    dimensions: int | None


def parse_embeddings(body: bytes, server: Server, vector_sizes: Sequence[int]) -> EmbeddingsRequest:
    """The request in the body of a POST; raises InvalidRequestError.

    vector_sizes  lengths that a vector can be given, the whole length last
    """
    fields = parse_fields(body)
    refuse_unsupported(fields, NOT_YET)
    wanted = convert(fields, EmbeddingsBody)
    prompts = prompts_in(wanted.input, "input")
    check_num_prompts(prompts, server.max_prompts, "input")
    _check_dimensions(wanted.dimensions, vector_sizes)
    salt = wanted.cache_salt
    call = vector_call(
        prompts,
        _rids(wanted.rid, len(prompts)),
        field="input",
        add_special_tokens=wanted.add_special_tokens is not False,
        namespace="" if salt is None else check_name(salt, "cache_salt", MAX_SALT_CHARS),
    )
    return EmbeddingsRequest(
        call=call,
        model=check_name(wanted.model, "model", MAX_RID_CHARS)
        if wanted.model
        else server.model_name,
        encoding_format=wanted.encoding_format or "float",
        dimensions=wanted.dimensions,
    )


def _rids(rid: str | None, num_prompts: int) -> list[str]:
    name = check_name(rid, "rid", MAX_RID_CHARS) if rid else f"embd-{uuid.uuid4().hex}"
    return [name] if num_prompts == 1 else [f"{name}-{number}" for number in range(num_prompts)]


def _check_dimensions(dimensions: int | None, vector_sizes: Sequence[int]) -> None:
    if dimensions is None or not vector_sizes or dimensions in vector_sizes:
        return
    if len(vector_sizes) == 1:
        reason = (
            f"the model's vectors have {vector_sizes[0]} numbers, and it does not say that they "
            "can be shortened (matryoshka): leave dimensions out"
        )
    elif isinstance(vector_sizes, range):
        reason = f"dimensions must be from 1 to {vector_sizes[-1]}, got {dimensions}"
    else:
        reason = f"dimensions can be {', '.join(map(str, vector_sizes))}, got {dimensions}"
    raise InvalidRequestError(reason, param="dimensions")


class EmbeddingsReply:
    """Vectors in the order of the inputs."""

    def __init__(self, request: EmbeddingsRequest) -> None:
        self._request = request

    def whole(self, answers: Sequence[Answer]) -> Any:
        """Raises AbortedError where there is no vector: the format has no place to say so."""
        num_tokens = sum(len(answer.prompt_ids) for answer in answers)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": answer.index, "embedding": self._shown(answer)}
                for answer in answers
            ],
            "model": self._request.model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    def _shown(self, answer: Answer) -> np.ndarray | str:
        if not answer.vector:
            raise AbortedError(f"the input of rid {answer.rid!r} was aborted on request")
        vector = shortened(np.frombuffer(answer.vector, np.float32), self._request.dimensions)
        if self._request.encoding_format == "float":
            return vector
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def shortened(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` numbers, again of length 1 together; the vector itself for all."""
    if dimensions is None or dimensions == len(vector):
        return vector
    start = vector[:dimensions]
    return start / max(float(np.linalg.norm(start)), 1e-12)
