"""A program's body run once without a backend, to see what it adds.

Only where the caller asks for it (`trace`, `cache`, `compile`): the body's side effects happen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sgl.lang.backends.base import Backend
from sgl.lang.ir import (
    Argument,
    Expr,
    Gen,
    Role,
    RoleBegin,
    RoleEnd,
    ScopeBegin,
    ScopeEnd,
    Select,
    join,
    joined,
)
from sgl.lang.loop import loop_thread
from sgl.lang.operations import JoinMode
from sgl.lang.prompt import Prompt
from sgl.lang.state import ProgramState, ProgramStates
from sgl.lang.transcript import Transcript

MIN_CACHED_CHARS = 64  # less is not worth a request

_local = threading.local()


@dataclass(frozen=True, slots=True)
class Value(Expr):
    """A variable of a trace, whose value is not known."""

    name: str

    __str__ = Argument.__str__
    __format__ = Argument.__format__


class CannotTraceError(Exception):
    """The body does what needs values."""


@dataclass(frozen=True, slots=True)
class Forked:
    """Copies that go on side by side."""

    copies: tuple[Trace, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """The copies that were made last come back."""

    mode: JoinMode


@dataclass
class Trace:
    """What a body added: expressions, arguments by name, and traces of copies.

    why_ended  what it could not do without values; None if it came to its end
    """

    parts: list[Expr | str | Forked | Joined] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)
    why_ended: Exception | None = None

    def constant(self) -> list[str | RoleBegin | RoleEnd]:
        """What every run begins with."""
        parts: list[str | RoleBegin | RoleEnd] = []
        for part in self.parts:
            if not isinstance(part, str | RoleBegin | RoleEnd):
                break
            parts.append(part)
        return parts

    def lines(self, depth: int = 0) -> Iterator[str]:
        for part in self.parts:
            if isinstance(part, Forked):
                for index, copy in enumerate(part.copies):
                    yield "  " * depth + f"fork {index}"
                    yield from copy.lines(depth + 1)
            else:
                yield "  " * depth + repr(part)

    def print_graph(self) -> None:
        print("\n".join(self.lines()))  # noqa: T201


class TracedState:
    """In place of the state: it notes what is added."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __iadd__(self, other: Any) -> TracedState:
        for part in joined(other).parts:
            self._trace.parts.append(part)
            if isinstance(part, Gen | Select) and part.name is not None:
                self._trace.variables.append(part.name)
        return self

    def __getitem__(self, name: str) -> Value:
        if name not in self._trace.variables:
            raise CannotTraceError(f"no variable {name!r}")
        return Value(name)

    get_var = __getitem__

    def __contains__(self, name: str) -> bool:
        return name in self._trace.variables

    def __setitem__(self, name: str, value: Any) -> None:
        self._trace.variables.append(name)

    set_var = __setitem__

    def system(self, said: Any = None) -> Any:
        return self._role("system", said)

    def user(self, said: Any = None) -> Any:
        return self._role("user", said)

    def assistant(self, said: Any = None) -> Any:
        return self._role("assistant", said)

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        self._trace.parts.append(ScopeBegin(name))
        yield
        self._trace.parts.append(ScopeEnd(name))
        self._trace.variables.append(name)

    def fork(self, n: int = 1, position_ids_offset: Any = None) -> TracedStates:
        copies = tuple(Trace(variables=list(self._trace.variables)) for _ in range(n))
        self._trace.parts.append(Forked(copies))
        return TracedStates([TracedState(copy) for copy in copies], self._trace)

    @contextmanager
    def copy(self) -> Iterator[TracedState]:
        yield self.fork(1)[0]

    def _role(self, role: Role, said: Any) -> Any:
        if said is not None:
            return join(RoleBegin(role), said, RoleEnd(role))
        return self._role_scope(role)

    @contextmanager
    def _role_scope(self, role: Role) -> Iterator[None]:
        self._trace.parts.append(RoleBegin(role))
        yield
        self._trace.parts.append(RoleEnd(role))

    def __getattr__(self, name: str) -> Any:
        raise CannotTraceError(f"{name} needs a program that runs")


class TracedStates(list[TracedState]):
    """In place of copies of a state."""

    def __init__(self, states: list[TracedState], source: Trace) -> None:
        super().__init__(states)
        self._source = source

    def __iadd__(self, other: Any) -> TracedStates:  # type: ignore[override, misc]
        parts = other if isinstance(other, list | tuple) else [other] * len(self)
        if callable(other):
            parts = [other(index) for index in range(len(self))]
        for state, part in zip(self, parts, strict=True):
            state += part
        return self

    def join(self, mode: JoinMode = "gather_variable") -> None:
        self._source.parts.append(Joined(mode))
        for state in self:
            self._source.variables += state._trace.variables


def is_tracing() -> bool:
    return getattr(_local, "depth", 0) > 0


def trace(body: Callable[..., Any], names: Sequence[str], given: Mapping[str, Any]) -> Trace:
    """Run the body with names in place of the arguments that are not given."""
    found = Trace()
    arguments = {name: given.get(name, Argument(name)) for name in names}
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        body(TracedState(found), **arguments)
    except (CannotTraceError, TypeError, AttributeError) as error:  # it needs values from here on
        found.why_ended = error
    finally:
        _local.depth -= 1
    return found


def constant_text(found: Trace, backend: Backend) -> str:
    """What every run begins with, as the backend's template writes it."""
    said = Transcript(backend.chat_template)
    for part in found.constant():
        said.write(part)
    return said.text


def cache(found: Trace, backend: Backend) -> str:
    """Compute what every run begins with; gives that text, "" where it is not worth it."""
    text = constant_text(found, backend)
    if len(text) < MIN_CACHED_CHARS:
        return ""
    loop_thread().wait_for(backend.prefill(Prompt(text, (), None, (), ())))
    return text


def replay(found: Trace, state: ProgramState, arguments: Mapping[str, Any]) -> None:
    """Add to a state what a trace says, with values."""
    copies: ProgramStates | None = None
    for part in found.parts:
        match part:
            case Argument(name):
                state += str(arguments[name])
            case Value(name):
                state += str(state[name])
            case Forked(traces):
                copies = state.fork(len(traces))
                for copy, inner in zip(copies, traces, strict=True):
                    replay(inner, copy, arguments)
            case Joined(mode):
                assert copies is not None, "a join follows on a fork"
                copies.join(mode)
            case _:
                state += part
