"""A request's bytes to typed fields; whatever is wrong with them names the field and says why."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import orjson

from sgl.errors import InvalidRequestError
from sgl.sampling_params import MAX_STOPS

MAX_NESTING = 64
MAX_RID_CHARS = 256
MAX_SALT_CHARS = 256
MAX_TOP_LOGPROBS = 20
_MAX_SIZES = {"stop": MAX_STOPS, "stop_token_ids": 1024, "logit_bias": 4096}

T = TypeVar("T")
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`")


def parse_fields(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. NaN, Infinity, lone surrogates and deep nesting are refused."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"the body must be a JSON object, got {json_kind(fields)}")
    check_nesting(fields)
    return fields


def convert(fields: Mapping[str, Any], body_type: type[T]) -> T:
    """`fields` as a `body_type`; unknown fields are ignored, wrong types refused."""
    try:
        return msgspec.convert(fields, body_type)
    except msgspec.ValidationError as error:
        raise _named(error) from None


def refuse_unsupported(fields: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse what would be silently left out of the answer otherwise."""
    for name in names:
        if fields.get(name) is not None:
            raise InvalidRequestError(f"{name} is not supported by this server yet", param=name)


def check_name(value: str, field: str, max_chars: int) -> str:
    """`value`, which ends up in log lines and keys: short and printable."""
    if not 0 < len(value) <= max_chars or not value.isprintable():
        raise InvalidRequestError(
            f"{field} must be 1 to {max_chars} printable characters", param=field
        )
    return value


def check_sizes(sampling: Mapping[str, Any]) -> None:
    """Refuse long lists before each of their entries is looked at."""
    for name, most in _MAX_SIZES.items():
        value = sampling.get(name)
        if isinstance(value, list | dict) and len(value) > most:
            raise InvalidRequestError(
                f"{name} must have at most {most} entries, got {len(value)}", param=name
            )


def check_num_prompts(prompts: Sequence[object], max_prompts: int | None, field: str) -> None:
    if max_prompts is not None and len(prompts) > max_prompts:
        raise InvalidRequestError(
            f"{field} holds {len(prompts)} prompts, a request may hold {max_prompts}: send several "
            "requests, or start the server with a larger --max-batch-requests",
            param=field,
        )


def id_array(ids: Any, field: str) -> array[int]:
    """Token ids as int32; raises InvalidRequestError where one is no integer or too large."""
    if not isinstance(ids, list) or not ids:
        raise InvalidRequestError(f"{field} must hold lists of token ids, none empty", param=field)
    try:
        return array("i", ids)
    except TypeError:
        raise InvalidRequestError(
            f"{field} must hold integers, or lists of integers, not both", param=field
        ) from None
    except OverflowError:
        raise InvalidRequestError(f"{field} holds an id outside 32 bits", param=field) from None


def json_kind(value: object) -> str:
    """How JSON calls the type of `value`."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def check_nesting(fields: dict[str, Any]) -> None:
    level: list[Any] = [fields]
    for _ in range(MAX_NESTING):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise InvalidRequestError(f"the body is nested more than {MAX_NESTING} levels deep")


def _children(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, dict) else value
    return [item for item in items if isinstance(item, dict | list)]


def _named(error: msgspec.ValidationError) -> InvalidRequestError:
    message = str(error)
    where = _PATH.search(message)
    path = where["path"] if where else ""
    reason = _PATH.sub("", message).replace("`", "")
    return InvalidRequestError(f"{path}: {reason}" if path else reason, param=path or None)
