"""Expressions: what a program adds to its state. A closed set, all frozen; strings are text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

if TYPE_CHECKING:
    from sgl.lang.choices import ChoicesSamplingMethod

REGEX_INT = r"[-+]?[0-9]+[ \n]*"
REGEX_FLOAT = r"[-+]?[0-9]*\.?[0-9]+[ \n]*"
REGEX_BOOL = r"(True|False)"
REGEX_STR = r"\"[\w\d\s]*\""  # with the quotes

Role: TypeAlias = Literal["system", "user", "assistant"]
Dtype: TypeAlias = Literal["int", "float", "str", "bool"]

_OF_DTYPE: dict[Dtype, tuple[str, tuple[str, ...]]] = {  # regex, and where it stops
    "int": (REGEX_INT, (" ", "\n")),
    "float": (REGEX_FLOAT, (" ", "\n")),
    "str": (REGEX_STR, ()),
    "bool": (REGEX_BOOL, ()),
}


class Expr:
    """Joined to others, and to text on either side, by `+`."""

    __slots__ = ()

    def __add__(self, other: Expr | str) -> Join:
        return join(self, other)

    def __radd__(self, other: str) -> Join:
        return join(other, self)


@dataclass(frozen=True, slots=True)
class Join(Expr):
    """One after the other."""

    parts: tuple[Expr | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to generate; None is not said, and leaves it to the run, then to the backend.

    max_tokens, min_tokens   of the answer
    stop                     texts that end it, and are not part of it
    stop_token_ids           tokens that do
    top_k                    -1: all
    ignore_eos               go on after the token that ends answers
    return_logprob           tell log-probabilities in the meta info
    logprob_start_len        of the prompt too, from this token on
    top_logprobs_num         of so many of the likeliest tokens in each place
    return_text_in_logprobs  with the texts of tokens
    dtype, regex, json_schema, ebnf   what the answer must match; at most one
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    ignore_eos: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None
    dtype: Dtype | None = None
    regex: str | None = None
    json_schema: str | None = None
    ebnf: str | None = None

    def over(self, defaults: Sampling) -> Sampling:
        """What is said here, and where nothing is, what the defaults say."""
        said = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        return replace(defaults, **said) if said else defaults

    def with_stops(self, stops: Sequence[str]) -> Sampling:
        """Also stop at these."""
        return replace(self, stop=(*(self.stop or ()), *stops)) if stops else self

    def with_dtype_as_regex(self) -> Sampling:
        """For backends that know regular expressions, but not types."""
        if self.dtype is None:
            return self
        regex, stops = _OF_DTYPE[self.dtype]
        return replace(self, dtype=None, regex=regex).with_stops(stops)


_SAMPLING = [one.name for one in fields(Sampling)]
DEFAULTS = Sampling(max_tokens=128, temperature=1.0)


@dataclass(frozen=True, slots=True)
class Gen(Expr):
    """Text by the model; without a name it is kept in no variable.

    thinks_as  the kind of model whose thoughts are to be kept apart from the text
    """

    name: str | None
    sampling: Sampling
    thinks_as: str | None = None


@dataclass(frozen=True, slots=True)
class Select(Expr):
    """The likeliest of some texts."""

    name: str | None
    choices: tuple[str, ...]
    temperature: float
    method: ChoicesSamplingMethod


@dataclass(frozen=True, slots=True)
class Image(Expr):
    """A picture.

    data  as it was stored: JPEG, PNG, …
    """

    data: bytes


@dataclass(frozen=True, slots=True)
class Video(Expr):
    """Pictures of a film, evenly spaced: PNG."""

    frames: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class RoleBegin(Expr):
    role: Role


@dataclass(frozen=True, slots=True)
class RoleEnd(Expr):
    role: Role


@dataclass(frozen=True, slots=True)
class ScopeBegin(Expr):
    """What comes until its end becomes a variable."""

    name: str


@dataclass(frozen=True, slots=True)
class ScopeEnd(Expr):
    name: str


class CannotTraceError(TypeError):
    """The body of a program does what needs values."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Unknown(Expr):
    """What has no value while a program is traced. It can be added to the program, and no more."""

    name: str

    def __str__(self) -> str:
        raise CannotTraceError(
            f"Cannot put argument inside a f-string: {self.name!r} has no value while a program is "
            "traced; add it with + instead"
        )

    def __format__(self, spec: str) -> str:
        return str(self)

    def _has_no_value(self, *_: object) -> NoReturn:
        raise CannotTraceError(f"{self.name!r} has no value while a program is traced")

    __repr__ = __bool__ = __eq__ = __ne__ = __hash__ = _has_no_value
    __lt__ = __le__ = __gt__ = __ge__ = _has_no_value


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Argument(Unknown):
    """An argument of the program."""


def join(*parts: Expr | str) -> Join:
    """Flat: no Join in a Join."""
    flat: list[Expr | str] = []
    for part in parts:
        if isinstance(part, Join):
            flat += part.parts
        elif isinstance(part, str | Expr):
            flat.append(part)
        else:
            raise TypeError(
                f"a program is made of text and of expressions such as gen(...), not of "
                f"{type(part).__name__}: {part!r:.80}"
            )
    return Join(tuple(flat))


def joined(parts: Any) -> Join:
    """Of what may be added to a state: text, an expression, or a list of them."""
    if isinstance(parts, list | tuple):
        return join(*parts)
    if parts is None:
        raise ValueError("None was added to a program: a function without return gives None")
    return join(parts)


def check_regex(pattern: str) -> str:
    """Raises ValueError where it is none, at the line that wrote it."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"regex={pattern!r:.200} is no regular expression: {error}") from None
    return pattern
