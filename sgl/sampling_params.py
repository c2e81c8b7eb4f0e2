"""How the next token is chosen and when a request stops: one immutable value per request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec

from sgl.errors import InvalidRequestError

GREEDY_BELOW = 1e-6  # a temperature under this means: take the likeliest token
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_N = 128
MAX_INT32 = 2**31 - 1


class GrammarKind(StrEnum):
    """The field of a request that a grammar comes from."""

    REGEX = "regex"
    JSON_SCHEMA = "json_schema"
    EBNF = "ebnf"
    STRUCTURAL_TAG = "structural_tag"


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an answer must match; made by constrained/grammar.py.

    text  as the client wrote it; JSON in its shortest form
    """

    kind: GrammarKind
    text: str


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The `sampling_params` of a request, checked when made (raises InvalidRequestError).

    max_new_tokens      None: until the context is full; 0: prefill only
    min_new_tokens      end-of-sequence and stop tokens are masked until so many are out
    stop                strings that end the text; the earliest in the text wins, then the longest
    stop_token_ids      ids that end the text, as the model's own end-of-sequence ids do
    temperature         0 is greedy
    top_k, top_p, min_p restrict the draw: to the k likeliest, to the smallest set holding mass p,
                        to tokens with at least min_p times the likeliest one's probability
    frequency_penalty   logits -= penalty * times the token is in the output
    presence_penalty    logits -= penalty if the token is in the output
    repetition_penalty  logits of tokens in prompt or output: divided if positive, else multiplied
    logit_bias          token id -> added to its logit (-100 … 100)
    seed                of the request's own random numbers; None: drawn by the server
    n                   how many answers to generate
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_numbers()
        self._check_stops()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def has_penalty(self) -> bool:
        return (
            self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Checked parameters from a client's JSON object; the error names the field at fault."""
        known = dict(fields)
        unknown = sorted(set(known) - set(cls.__struct_fields__))
        if unknown:
            raise InvalidRequestError(
                f"sampling_params has no field {unknown[0]!r}; it has "
                f"{', '.join(sorted(cls.__struct_fields__))}",
                param=unknown[0],
            )
        for name in ("stop", "stop_token_ids"):
            known[name] = _as_list(known.get(name))
        if isinstance(known.get("logit_bias"), Mapping):
            known["logit_bias"] = {str(key): bias for key, bias in known["logit_bias"].items()}
        for name, value in known.items():
            if value is None and name not in _NULLABLE:
                known[name] = _DEFAULTS[name]
        return _strict(known)

    def _check_counts(self) -> None:
        if self.max_new_tokens is not None and not 0 <= self.max_new_tokens <= MAX_INT32:
            raise _refuse("max_new_tokens", f"from 0 to {MAX_INT32}", self.max_new_tokens)
        top = math.inf if self.max_new_tokens is None else self.max_new_tokens
        if not 0 <= self.min_new_tokens <= top:
            raise _refuse("min_new_tokens", "from 0 to max_new_tokens", self.min_new_tokens)
        if not 1 <= self.n <= MAX_N:
            raise _refuse("n", f"from 1 to {MAX_N}", self.n)
        if self.top_k != -1 and not 1 <= self.top_k <= MAX_INT32:
            raise _refuse("top_k", f"-1 (off) or from 1 to {MAX_INT32}", self.top_k)
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise _refuse("seed", "a 64-bit integer", self.seed)

    def _check_numbers(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise _refuse(name, f"from {low:g} to {high:g}", value)
        if self.top_p == 0.0:
            raise _refuse("top_p", "above 0 and at most 1", self.top_p)
        if self.repetition_penalty == 0.0:
            raise _refuse("repetition_penalty", "above 0 and at most 2", self.repetition_penalty)
        for token_id, bias in (self.logit_bias or {}).items():
            if not (math.isfinite(bias) and -100.0 <= bias <= 100.0):
                raise _refuse(f"logit_bias of token {token_id}", "from -100 to 100", bias)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise _refuse("stop", f"at most {MAX_STOPS} strings", len(self.stop))
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARS:
                raise _refuse("stop", f"strings of 1 to {MAX_STOP_CHARS} characters", len(text))


_NULLABLE = ("max_new_tokens", "seed", "logit_bias")
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}
_TYPES = {field.name: field.type for field in msgspec.structs.fields(SamplingParams)}
_RANGES = (
    ("temperature", 0.0, 1e6),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, 2.0),
)


def _strict(fields: dict[str, Any]) -> SamplingParams:
    """Convert by field name (the struct itself travels as an array, which has no names)."""
    values = {}
    for name, value in fields.items():
        try:
            values[name] = msgspec.convert(value, _TYPES[name], str_keys=True)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"{name}: {error}", param=name) from None
    return SamplingParams(**values)


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


def _refuse(name: str, wanted: str, got: object) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {wanted}, got {got}", param=name)
