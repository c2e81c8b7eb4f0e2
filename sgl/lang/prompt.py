"""What a backend is asked, and what it answers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sgl.lang.ir import Gen

Message: TypeAlias = "dict[str, Any]"  # {"role": …, "content": …}, as OpenAI's API has it


@dataclass(frozen=True, slots=True)
class Held:
    """The beginning of a program's text as the tokens that the server computed.

    Text that is tokenized again may become other tokens than the model wrote, which no cache has.

    num_chars  of the text, that `ids` stand for
    """

    ids: array[int]
    num_chars: int


NOTHING_HELD = Held(array("i"), 0)


@dataclass(frozen=True, slots=True)
class Prompt:
    """All that a program has so far.

    text      everything, with the template's marks around roles
    messages  what was said in roles that have ended
    begun     what the role that has not ended says so far; None outside of roles
    images    those in the text, in order
    stops     texts that end an answer in this role
    held      the text's beginning, where a backend has tokens of it
    ahead     what the program has said already that comes after the answer, in the same role; for
              backends that read it
    """

    text: str
    messages: Sequence[Message]
    begun: str | None
    images: Sequence[bytes]
    stops: Sequence[str]
    held: Held = NOTHING_HELD
    ahead: Sequence[str | Gen] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """
    text       that goes on from the prompt
    meta_info  as the backend tells it
    held       tokens of prompt and answer together
    """

    text: str
    meta_info: dict[str, Any] = field(default_factory=dict)
    held: Held = NOTHING_HELD
