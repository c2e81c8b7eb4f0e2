"""What programs are written with: `gen`, `select`, `image`, roles."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

from sgl.lang.choices import ChoicesSamplingMethod, token_length_normalized
from sgl.lang.images import image_bytes, video_frames
from sgl.lang.ir import (
    Dtype,
    Expr,
    Gen,
    Image,
    Join,
    Role,
    RoleBegin,
    RoleEnd,
    Sampling,
    Select,
    Video,
    check_regex,
    join,
)
from sgl.protocol.reasoning import REASONING_FORMATS


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    stop: str | Iterable[str] | None = None,
    stop_token_ids: Iterable[int] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesSamplingMethod | None = None,
    regex: str | None = None,
    json_schema: Any = None,
    ebnf: str | None = None,
) -> Expr:
    """Text by the model, which becomes variable `name` of the program.

    What is not given is as `run` says. `choices` makes it a `select`. Of `dtype` (int, float, str
    in quotes, bool), `regex`, `json_schema` (text, dict or pydantic model) and `ebnf`, at most one
    says what the answer must match. Raises ValueError or TypeError at the line that is wrong.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"gen(name) is the name of a variable, not {type(name).__name__}")
    if choices is not None:
        return select(name, choices, temperature or 0.0, choices_method or token_length_normalized)
    if choices_method is not None:
        raise ValueError("choices_method= is for choices=")
    kind = _dtype(dtype)
    if kind is not None and regex is not None:
        warnings.warn(f"both dtype={kind} and regex= are given: dtype is taken", stacklevel=2)
        regex = None
    shapes = {"dtype": kind, "regex": regex, "json_schema": json_schema, "ebnf": ebnf}
    if len(given := [key for key, value in shapes.items() if value is not None]) > 1:
        raise ValueError(f"gen takes only one of {' and '.join(given)}")
    return Gen(
        name,
        Sampling(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=texts(stop),
            stop_token_ids=None if stop_token_ids is None else tuple(stop_token_ids),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            ignore_eos=ignore_eos,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
            return_text_in_logprobs=return_text_in_logprobs,
            dtype=kind,
            regex=None if regex is None else check_regex(regex),
            json_schema=None if json_schema is None else _schema_text(json_schema),
            ebnf=ebnf,
        ),
    )


def gen_int(name: str | None = None, max_tokens: int | None = None, **how: Any) -> Expr:
    """A whole number, as text; `how` is as for `gen`."""
    return gen(name, max_tokens, dtype=int, **_without_shape(how))


def gen_string(name: str | None = None, max_tokens: int | None = None, **how: Any) -> Expr:
    """Words in quotes; `how` is as for `gen`."""
    return gen(name, max_tokens, dtype=str, **_without_shape(how))


def separate_reasoning(expr: Expr, model_type: str = "deepseek-r1") -> Join:
    """What the model thinks is kept apart from what it says, in each `gen(name)` of `expr`.

    Variable `name` and the text hold what it says, `name_reasoning_content` what it has thought.
    `model_type` is as `--reasoning-parser` of the server: deepseek-r1, for models that always
    think, or qwen3, for those that may. Raises ValueError where it is none of them.
    """
    if model_type not in REASONING_FORMATS:
        raise ValueError(f"model_type={model_type!r}: it is one of {', '.join(REASONING_FORMATS)}")
    parts = join(expr).parts
    return join(
        *(replace(part, thinks_as=model_type) if isinstance(part, Gen) else part for part in parts)
    )


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesSamplingMethod = token_length_normalized,
) -> Expr:
    """The likeliest of `choices`, which becomes variable `name`."""
    if choices is None or isinstance(choices, str):
        raise TypeError("select needs a list of texts: choices=[…]")
    choices = tuple(choices)
    if not choices:
        raise ValueError("select needs at least one choice")
    if wrong := [choice for choice in choices if not isinstance(choice, str)]:
        raise TypeError(f"choices are texts, not {type(wrong[0]).__name__}: {wrong[0]!r:.80}")
    return Select(name, choices, temperature, choices_method)


def image(source: Any) -> Expr:
    """A picture: a path, bytes of a file, or a PIL image. It is read here and now."""
    return Image(image_bytes(source))


def video(path: str | os.PathLike[str], num_frames: int) -> Expr:
    """So many pictures of a film, evenly spaced. It is read here and now."""
    return Video(video_frames(path, num_frames))


def system(said: Expr | str | None = None) -> Join:
    """What rules the conversation."""
    return _in_role("system", said)


def user(said: Expr | str | None = None) -> Join:
    """What the user says."""
    return _in_role("user", said)


def assistant(said: Expr | str | None = None) -> Join:
    """What the model says."""
    return _in_role("assistant", said)


def system_begin() -> Expr:
    return RoleBegin("system")


def system_end() -> Expr:
    return RoleEnd("system")


def user_begin() -> Expr:
    return RoleBegin("user")


def user_end() -> Expr:
    return RoleEnd("user")


def assistant_begin() -> Expr:
    return RoleBegin("assistant")


def assistant_end() -> Expr:
    return RoleEnd("assistant")


def _in_role(role: Role, said: Expr | str | None) -> Join:
    return join(RoleBegin(role), "" if said is None else said, RoleEnd(role))


def texts(stop: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if stop is None:
        return None
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _dtype(dtype: type | str | None) -> Dtype | None:
    if dtype is None:
        return None
    name: Any = dtype.__name__ if isinstance(dtype, type) else dtype
    if name not in get_args(Dtype):
        raise ValueError(f"dtype={name!r}: it is one of {', '.join(get_args(Dtype))}")
    return name  # type: ignore[no-any-return]


def _schema_text(schema: Any) -> str:
    if isinstance(schema, str):
        return schema
    if isinstance(schema, dict):
        return json.dumps(schema)
    if callable(describe := getattr(schema, "model_json_schema", None)):
        return json.dumps(describe())
    raise TypeError(f"json_schema= is text, a dict or a pydantic model, not {schema!r:.80}")


def _without_shape(how: dict[str, Any]) -> dict[str, Any]:
    if wrong := {"dtype", "choices", "choices_method", "regex", "json_schema", "ebnf"} & how.keys():
        raise TypeError(f"it is of a type already: leave out {', '.join(sorted(wrong))}")
    return how
