"""A request's bytes to typed fields; whatever is wrong with them names the field and says why."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec
import orjson
from msgspec import Meta

from sgl.errors import InvalidRequestError

logger = logging.getLogger(__name__)

MAX_NESTING = 64
MAX_TOLD = 256  # names of fields that the log tells of
MAX_RID_CHARS = 256
MAX_SALT_CHARS = 256
MAX_TOP_LOGPROBS = 20

Name = Annotated[str, Meta(max_length=MAX_RID_CHARS)]  # empty: not given
Salt = Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARS)]
NumTopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]

T = TypeVar("T", bound=msgspec.Struct)
_told: set[str] = set()
_PATH = re.compile(r" - at (?P<key>`key` in )?`\$\.?(?P<path>[^`]*)`")
_STEP = re.compile(r"\[(?P<index>\d+)\]|\.?(?P<name>[^.\[]+)")
_MISSING = re.compile("Object missing required field `(?P<name>[^`]+)`")
_KIND = re.compile("Expected `(?P<wanted>[^`]+)`, got `(?P<got>[^`]+)`")
_LIMIT = re.compile(
    r"Expected `(?P<kind>\w+)` (?P<length>of length )?(?P<sign>[<>]=?) (?P<bound>\S+)"
)
_SIGNS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
}


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


def one_of(*values: str) -> Meta:
    """What a text is described by that is compared by hand, which gives a better sentence."""
    return Meta(extra_json_schema={"enum": list(values)})


def convert(fields: Mapping[str, Any], body_type: type[T], *, is_text: bool = False) -> T:
    """`fields` as a `body_type`; wrong types and values are refused.

    Unknown fields are ignored, and the log tells of each name once.

    is_text   all values are texts, as in a query
    """
    if unknown := fields.keys() - _names_of(body_type):
        _tell_once(unknown)
    try:
        return msgspec.convert(fields, body_type, strict=not is_text)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), fields) from None


@cache
def _names_of(body_type: type) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(body_type))


def _tell_once(names: Iterable[str]) -> None:
    new = sorted(set(names) - _told)[: MAX_TOLD - len(_told)]
    _told.update(new)
    for name in new:
        logger.warning("Requests have a field %.80r, which is not known here: it is ignored", name)


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


def _refusal(message: str, fields: Mapping[str, Any]) -> InvalidRequestError:
    """Says in our words what msgspec says in `message` of `fields`."""
    where = _PATH.search(message)
    path = where["path"] if where else ""
    reason = _PATH.sub("", message)
    if missing := _MISSING.fullmatch(reason):
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequestError(f"{name} must be given", param=name)
    param = path.removesuffix("[...]")  # in place of a key
    subject = path
    if where and (where["key"] or path != param):
        subject = f"a {'key' if where['key'] else 'value'} of {param}"
    if limit := _LIMIT.fullmatch(reason):
        value = None if subject != path else _value_at(path, fields)
        reason = " " + _beyond(limit, value)
    elif kind := _KIND.fullmatch(reason):
        reason = f" must be {_kinds(kind['wanted'])}, got {_kinds(kind['got'])}"
    else:
        reason = ": " + reason.replace("`", "")
    return InvalidRequestError(f"{subject}{reason}".removeprefix(": "), param=param or None)


def _beyond(limit: re.Match[str], value: Any) -> str:
    """`value` is None where it cannot be found."""
    bound = f"{_SIGNS[limit['sign']]} {limit['bound'].removesuffix('.0')}"
    if not limit["length"]:
        return f"must be {bound}" + (f", got {value}" if value is not None else "")
    unit = "characters" if limit["kind"] == "str" else "entries"
    return f"must have {bound} {unit}" + (f", got {len(value)}" if value is not None else "")


def _kinds(names: str) -> str:
    return " or ".join(_KINDS.get(name, name) for name in names.split(" | "))


def _value_at(path: str, fields: Mapping[str, Any]) -> Any:
    """What stands at a path such as `messages[0].role`."""
    value: Any = fields
    for step in _STEP.finditer(path):
        value = value[int(step["index"])] if step["index"] else value[step["name"]]
    return value
