"""The object `sampling_params` of `/generate`, as it is described.

It is parsed by SamplingParams.from_dict, and as a grammar, which gives better errors. This class
says the same of names, types, defaults and limits, because it is made of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from sgl.protocol.json_schema import reference
from sgl.protocol.openai_grammar import GrammarBody
from sgl.sampling_params import (
    MAX_STOP_IDS,
    MAX_STOPS,
    WRITTEN_KINDS,
    SamplingParams,
    StopText,
    TokenId,
)

_NAME = "SamplingParams"
_OTHER: dict[str, Any] = {  # than the parameters that are made of them
    "stop": StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)],
    "stop_token_ids": TokenId | Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)],
}
_DOC = "How to go on, and what the answer must match; null means not given.\n"


def _fields() -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(SamplingParams, include_extras=True)
    for field in msgspec.structs.fields(SamplingParams):
        hint = _OTHER.get(field.name, hints[field.name]) | None
        yield field.name, hint, field.default
    hints = get_type_hints(GrammarBody, include_extras=True)
    for kind in WRITTEN_KINDS:
        yield kind.value, hints[kind], None


SamplingSchema = msgspec.defstruct(
    _NAME,
    _fields(),
    namespace={"__doc__": _DOC + cleandoc(GrammarBody.__doc__ or "").partition("\n")[2]},
    kw_only=True,
    forbid_unknown_fields=True,
)
SamplingFields = Annotated[dict[str, Any], Meta(extra_json_schema=reference(_NAME))]
