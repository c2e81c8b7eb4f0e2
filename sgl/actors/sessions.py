"""All sessions of a server: opened, gone on with, closed, and forgotten when nobody uses them.

    find ──▶ Turn ──▶ prompt: what was said before, then the input ──▶ begin ──▶ end
     └─▶ Finish: there is no such session or request, which the answer tells

Only token ids are kept. The KV of what was said lies in the radix cache like everybody's, where the
next request of the session finds it: no session holds any of the device's memory.
"""

from __future__ import annotations

import time
import uuid
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from sgl.actors.session_tree import NODE_TOKENS, Node, Session
from sgl.errors import InvalidRequestError, OverloadedError
from sgl.messages import Finish
from sgl.protocol.call import ABSENT_STATUS, CONFLICT_STATUS, Answer
from sgl.protocol.session import OpenSession, SessionParams

MAX_TOKENS = 2**26  # of all sessions: 256 MiB


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """
    max_sessions  open at a time
    timeout_s     a session that nobody has used for so long is closed; 0: never
    """

    max_sessions: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a new request goes: after `parent`, of whose tokens `prefix` is kept."""

    session: Session
    parent: Node | None
    prefix: array[int]
    replaces: bool

    def replaced(self) -> list[Node]:
        """Requests that are forgotten when this one begins."""
        return self.session.after(self.parent) if self.replaces else []

    def interrupted(self) -> list[int]:
        """Ids of requests in the engine that must end before this one begins."""
        before = [self.parent] if self.parent is not None else []
        return [node.request_id for node in (*before, *self.replaced()) if node.running]


class TokenTexts(Protocol):
    """What sessions need of a tokenizer."""

    @property
    def added_id(self) -> int | None:
        """What it puts before every text, if anything; in the middle it is dropped."""

    def num_chars(self, ids: Iterable[int]) -> int: ...


class Sessions:
    """session id -> tree of requests; `clock` gives seconds."""

    def __init__(
        self,
        limits: SessionLimits,
        texts: TokenTexts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._texts = texts
        self._clock = clock
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, wanted: OpenSession) -> str:
        """The id of a new session; raises InvalidRequestError or OverloadedError."""
        self.sweep()
        session_id = wanted.session_id or uuid.uuid4().hex
        if session_id in self._sessions:
            raise InvalidRequestError(f"session {session_id!r} is open already", param="session_id")
        if len(self._sessions) >= self._limits.max_sessions:
            raise OverloadedError(
                f"{len(self._sessions)} sessions are open, the server keeps no more: close one, or "
                "start it with a larger --max-sessions"
            )
        self._sessions[session_id] = Session(wanted.capacity_of_str_len, self._clock())
        return session_id

    def close(self, session_id: str) -> None:
        """Forget a session; its requests that run go on. Nothing happens if there is none."""
        self._sessions.pop(session_id, None)

    def sweep(self) -> None:
        """Forget those that nobody has used for long."""
        for session_id in list(self._sessions):
            self._find(session_id)

    def find(self, params: SessionParams) -> Turn | Finish:
        """Where a request goes, or why it ends at once."""
        session = self._find(params.id)
        if session is None:
            return _abort(f"there is no session {params.id!r}: it was closed, or not used for long")
        session.last_used = self._clock()
        if params.rid is None:
            return Turn(session, None, array("i"), bool(params.replace))
        parent = session.get(params.rid)
        if parent is None:
            return _abort(f"session {params.id!r} has no request {params.rid!r:.256}")
        if parent.running is not None and not params.replace:
            return _abort(
                f"request {params.rid!r} still runs: wait for its end, or set replace to end it",
                CONFLICT_STATUS,
            )
        prefix = parent.ids()[: params.offset or None]
        return Turn(session, parent, prefix, bool(params.replace))

    def prompt(self, turn: Turn, input_ids: array[int]) -> array[int]:
        """The tokens of the request: those from before, then its own."""
        if turn.parent is not None and input_ids[:1].tolist() == [self._texts.added_id]:
            input_ids = input_ids[1:]
        return turn.prefix + input_ids

    def check(self, turn: Turn, rid: str, prompt_ids: array[int]) -> None:
        """Raises InvalidRequestError or OverloadedError where the request has no room."""
        session, forgotten = turn.session, turn.replaced()
        if (known := session.get(rid)) is not None and known not in forgotten:
            raise InvalidRequestError(f"rid {rid!r} is a request of the session", param="rid")
        num_new = self._texts.num_chars(prompt_ids[len(turn.prefix) :])
        num_held = session.num_chars - sum(node.num_chars for node in forgotten)
        if num_held + num_new > session.capacity:
            raise InvalidRequestError(
                f"the session holds {num_held} characters, this prompt has {num_new} more, and its "
                f"capacity_of_str_len is {session.capacity}: open one with a larger capacity, or "
                "forget what is not needed with replace",
                param="session_params",
            )
        num_tokens = sum(one.num_tokens for one in self._sessions.values())
        if num_tokens + len(prompt_ids) + NODE_TOKENS > MAX_TOKENS:
            raise OverloadedError("the sessions hold too much together: close those not needed")

    def begin(self, turn: Turn, rid: str, request_id: int, answer: Answer) -> Node:
        """The request runs from now on. What it replaces is forgotten; it must have ended."""
        turn.session.remove(turn.replaced())
        num_shared = min(len(turn.prefix), len(answer.prompt_ids))
        own = answer.prompt_ids[num_shared:]
        node = Node(
            session=turn.session,
            rid=rid,
            request_id=request_id,
            parent=turn.parent,
            num_shared=num_shared,
            own=own,
            num_chars=self._texts.num_chars(own),
            running=answer,
        )
        turn.session.add(node)
        return node

    def end(self, node: Node) -> None:
        """Its answer is whole, or was ended."""
        assert node.running is not None, "a request ends once"
        num_chars = self._texts.num_chars(node.running.output_ids)
        node.session.end(node, num_chars, self._clock())

    def _find(self, session_id: str) -> Session | None:
        """None if there is none, or none any more."""
        session, timeout_s = self._sessions.get(session_id), self._limits.timeout_s
        if session is None:
            return None
        is_idle = session.num_running == 0 and self._clock() - session.last_used > timeout_s
        if is_idle and timeout_s:
            del self._sessions[session_id]
            return None
        return session


def _abort(message: str, status: int = ABSENT_STATUS) -> Finish:
    return Finish("abort", message=message, status=status)
