"""The bodies of the routes beside generation: tokens of texts, and the end of requests."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from sgl.sampling_params import TokenId


class TokenizeBody(msgspec.Struct, kw_only=True):
    """A text, or several; null means not given.

    text, prompt         two names for the text; one is needed. A list gives a list
    add_special_tokens   as the tokenizer does for a prompt
    """

    text: str | list[str] | None = None
    prompt: str | None = None
    add_special_tokens: bool = True


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """Token ids.

    tokens                ids of the vocabulary
    skip_special_tokens   leave out special tokens
    """

    tokens: Annotated[list[TokenId], Meta(min_length=1)]
    skip_special_tokens: bool = False


class AbortBody(msgspec.Struct, kw_only=True):
    """Which requests to end.

    rid         the rid of one
    abort_all   all of them; needs the admin level
    """

    rid: str | None = None
    abort_all: bool = False
