"""Sessions: what opens and closes one, and where in it a prompt of `/generate` goes on."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from sgl.protocol.body import MAX_RID_CHARS, check_name

Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_RID_CHARS)]


class OpenSession(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation.

    capacity_of_str_len  characters of all that is said in it: prompts and answers, each once
    session_id           a name for it; if not given, the server draws one
    """

    capacity_of_str_len: Annotated[int, msgspec.Meta(ge=1)]
    session_id: Name | None = None

    def __post_init__(self) -> None:
        if self.session_id is not None:
            check_name(self.session_id, "session_id", MAX_RID_CHARS)


class CloseSession(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation by its name.

    session_id   that /open_session told
    """

    session_id: Name


class SessionParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where in a session a prompt goes on. Names as SGLang has them.

    id       the session's
    rid      the request to go on from, prompt and answer; if not given, from nothing
    offset   so many of its tokens are kept; below 0: all but so many; 0: all
    replace  what followed on `rid` is forgotten, and ended where it still runs; without `rid`, all
             of the session
    """

    id: Name
    rid: str | None = None
    offset: int | None = None
    replace: bool | None = None
