"""How the next token is chosen and when a request stops: one immutable value per request."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import Meta

from sgl.errors import InvalidRequestError

GREEDY_BELOW = 1e-6  # a temperature under this means: take the likeliest token
MAX_STOPS = 16  # of a request
MAX_TEMPLATE_STOPS = 16  # that a chat template adds to them
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 1024
MAX_BIASES, MAX_BIAS = 4096, 100.0
MAX_N = 128
MAX_INT32 = 2**31 - 1

TokenId = Annotated[int, Meta(ge=0, le=MAX_INT32)]
NumTokens = Annotated[int, Meta(ge=0, le=MAX_INT32)]
Temperature = Annotated[float, Meta(ge=0.0, le=1e6)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=MAX_INT32, extra_json_schema={"not": {"const": 0}})]
MinP = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
RepetitionPenalty = Annotated[float, Meta(gt=0.0, le=2.0)]
BiasKeys = Meta(max_length=MAX_BIASES, extra_json_schema={"propertyNames": {"pattern": "^[0-9]+$"}})
Bias = Annotated[float, Meta(ge=-MAX_BIAS, le=MAX_BIAS)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
NumAnswers = Annotated[int, Meta(ge=1, le=MAX_N)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


class GrammarKind(StrEnum):
    """The field of a request that a grammar comes from; `tools` hold theirs in their schemas."""

    REGEX = "regex"
    JSON_SCHEMA = "json_schema"
    EBNF = "ebnf"
    STRUCTURAL_TAG = "structural_tag"
    TOOLS = "tools"


WRITTEN_KINDS = tuple(kind for kind in GrammarKind if kind is not GrammarKind.TOOLS)


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an answer must match; made by constrained/grammar.py.

    kind  the field that it comes from
    text  as the client wrote it, JSON in its shortest form; or, of our own and wherever there is a
          part, rules in Lark
    part  what stands in these rules under the name `part_name`
    """

    kind: GrammarKind
    text: str
    part: Grammar | None = None
    part_name: str = ""


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The `sampling_params` of a request, checked when made (raises InvalidRequestError).

    max_new_tokens      null: until the context is full; 0: prefill only
    min_new_tokens      end-of-sequence and stop tokens are masked until so many are out
    stop                strings that end the text; the earliest in the text wins, then the longest
    stop_token_ids      ids that end the text, as the model's own end-of-sequence ids do
    temperature         0 is greedy
    top_p               draw from the smallest set of tokens that holds this probability; 1: off
    top_k               draw from so many of the likeliest tokens; -1: off
    min_p               draw from tokens with at least this times the likeliest one's probability
    frequency_penalty   logits -= penalty * times the token is in the output
    presence_penalty    logits -= penalty if the token is in the output
    repetition_penalty  logits of tokens in prompt or output: divided if positive, else multiplied
    logit_bias          token id -> added to its logit
    seed                of the request's own random numbers; null: drawn by the server
    ignore_eos          go on after the model's end-of-sequence and after stop_token_ids
    skip_special_tokens  the text shows no special tokens
    spaces_between_special_tokens  changes nothing: the tokenizer knows
    no_stop_trim        the text shows the stop string that ended it
    n                   how many answers to generate; answer i uses seed + i
    """

    max_new_tokens: NumTokens | None = 128
    min_new_tokens: NumTokens = 0
    stop: Annotated[tuple[StopText, ...], Meta(max_length=MAX_STOPS + MAX_TEMPLATE_STOPS)] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_IDS)] = ()
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = -1
    min_p: MinP = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    logit_bias: Annotated[dict[int, Bias], BiasKeys] | None = None
    seed: Seed | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    n: NumAnswers = 1

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_counts()
        self._check_stops()
        self._check_biases()

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
            names = sorted([*cls.__struct_fields__, *WRITTEN_KINDS])
            close = difflib.get_close_matches(str(unknown[0]), names, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise InvalidRequestError(
                f"sampling_params has no field {unknown[0]!r}{meant}; it has {', '.join(names)}",
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
        top = math.inf if self.max_new_tokens is None else self.max_new_tokens
        if self.min_new_tokens > top:
            raise _refuse("min_new_tokens", "from 0 to max_new_tokens", self.min_new_tokens)
        if self.top_k == 0:
            raise _refuse("top_k", f"-1 (off) or from 1 to {MAX_INT32}", self.top_k)

    def _check_numbers(self) -> None:
        for name, limits in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not limits.hold(value):
                raise _refuse(name, limits.text, value)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOPS + MAX_TEMPLATE_STOPS:
            raise _refuse("stop", f"at most {MAX_STOPS} strings", len(self.stop))
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARS:
                raise _refuse("stop", f"strings of 1 to {MAX_STOP_CHARS} characters", len(text))
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise _refuse("stop_token_ids", f"at most {MAX_STOP_IDS} ids", len(self.stop_token_ids))
        for token_id in self.stop_token_ids:
            if not 0 <= token_id <= MAX_INT32:
                raise _refuse("stop_token_ids", "ids of the vocabulary", token_id)

    def _check_biases(self) -> None:
        biases = self.logit_bias or {}
        if len(biases) > MAX_BIASES:
            raise _refuse("logit_bias", f"at most {MAX_BIASES} entries", len(biases))
        for token_id, bias in biases.items():
            if not _BIAS_LIMITS.hold(bias):
                raise _refuse(f"logit_bias of token {token_id}", _BIAS_LIMITS.text, bias)


class _Limits(NamedTuple):
    """Where a number must lie: from `low` to `high`, or above `low`."""

    low: float
    high: float
    is_above: bool

    @classmethod
    def of(cls, hint: Any) -> _Limits | None:
        """Of a type that is annotated with both, or None if it is not."""
        for part in (hint, *get_args(hint)):
            for meta in getattr(part, "__metadata__", ()):
                if meta.le is not None:
                    low = meta.ge if meta.gt is None else meta.gt
                    return cls(low, meta.le, meta.gt is not None)
        return None

    @property
    def text(self) -> str:
        if self.is_above:
            return f"above {self.low:g} and at most {self.high:g}"
        return f"from {_short(self.low)} to {_short(self.high)}"

    def hold(self, value: float) -> bool:
        is_high_enough = value > self.low if self.is_above else value >= self.low
        return is_high_enough and value <= self.high  # NaN is neither


def _short(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


_NULLABLE = ("max_new_tokens", "seed", "logit_bias")
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}
_TYPES = get_type_hints(SamplingParams)
_LIMITS = {
    name: limits
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items()
    if (limits := _Limits.of(hint)) is not None
}
_BIAS_LIMITS = _Limits(-MAX_BIAS, MAX_BIAS, is_above=False)


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
    """`name` begins with the parameter's."""
    return InvalidRequestError(f"{name} must be {wanted}, got {got}", param=name.split()[0])


NO_TOKENS = SamplingParams(max_new_tokens=0, temperature=0.0)
