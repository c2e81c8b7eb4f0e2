"""What a chat template writes around roles, found by what it makes of a few conversations.

For programs of the language, which write a conversation piece by piece.
"""

from __future__ import annotations

from typing import Any, Protocol

from sgl.errors import InvalidRequestError
from sgl.protocol.answers import ChatFormat

SYSTEM, FIRST, REPLY, SECOND = (f"{word}4711{word}" for word in ("sys", "ask", "say", "and"))


class Template(Protocol):
    def render(self, messages: Any, /, *, add_generation_prompt: bool = True) -> str: ...


def chat_format(template: Template, bos_token: str) -> ChatFormat | None:
    """None where the template writes roles in no fixed way.

    bos_token  that the tokenizer puts before every text, so that it is left out; "" if none
    """
    try:
        return _found(template, bos_token)
    except (_NoFormatError, InvalidRequestError):
        return None


class _NoFormatError(Exception):
    """The template does not write what is expected where it is expected."""


def _found(template: Template, bos_token: str) -> ChatFormat:
    talk = [_said("user", FIRST), _said("assistant", REPLY)]
    start, between, reply_end = _split(template.render(talk, add_generation_prompt=False), talk)
    asked = template.render(talk[:1])
    _, after_first = _split(asked, talk[:1])
    _, user_end = _split(template.render(talk[:1], add_generation_prompt=False), talk[:1])
    reply_begin = _without_start(after_first, user_end)
    longer = [*talk, _said("user", SECOND)]
    user_begin = _without_start(_split(template.render(longer), longer)[2], reply_end)
    stop = reply_end.strip()
    if bos_token and user_begin.startswith(bos_token):  # every question begins as a new text
        reply_end, user_begin = reply_end + bos_token, user_begin.removeprefix(bos_token)
    start = start.removeprefix(bos_token)
    if not between.startswith(user_end):
        raise _NoFormatError
    system = _system(template, bos_token, user_begin)
    opening, default = start.removesuffix(user_begin), None
    if system is None:
        marks, merges = ("", ""), None
    else:
        opening, marks, merges = system
        if start != opening + user_begin:
            before = opening + (marks[0] if merges is None else user_begin + merges[0])
            after = marks[1] + user_begin if merges is None else merges[1]
            default = _without_end(_without_start(start, before), after)
    return {
        "roles": {
            "system": marks,
            "user": (user_begin, user_end),
            "assistant": (reply_begin, reply_end),
        },
        "default_system_prompt": default,
        "opening": opening,
        "merges_system": merges,
        "stops": [stop] if stop else [],
    }


def _system(
    template: Template, bos_token: str, user_begin: str
) -> tuple[str, tuple[str, str], tuple[str, str] | None] | None:
    """Opening, marks and where it is merged; None where the template knows no system."""
    talk = [_said("system", SYSTEM), _said("user", FIRST)]
    try:
        text = template.render(talk, add_generation_prompt=False)
    except InvalidRequestError:
        return None
    if SYSTEM not in text:
        return None
    before, between, _ = _split(text, talk)
    before = before.removeprefix(bos_token)
    if between.endswith(user_begin) and user_begin:
        return "", (before, between.removesuffix(user_begin)), None
    opening, found, merge_begin = before.partition(user_begin)
    if not found:
        raise _NoFormatError
    return opening, (merge_begin, between), (merge_begin, between)


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _split(text: str, talk: list[dict[str, str]]) -> list[str]:
    """What stands before, between and after the contents; each must be there once, in order."""
    parts = []
    for message in talk:
        if text.count(message["content"]) != 1:
            raise _NoFormatError
        before, _, text = text.partition(message["content"])
        parts.append(before)
    return [*parts, text]


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _NoFormatError
    return text.removeprefix(start)


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise _NoFormatError
    return text.removesuffix(end)
