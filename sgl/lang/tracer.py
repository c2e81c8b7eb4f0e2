"""A program's body run once without a backend, to see what it adds.

Only where the caller asks for it (`trace`, `cache`, `compile`): the body's side effects happen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from sgl.lang.backends.base import Backend
from sgl.lang.ir import (
    Argument,
    CannotTraceError,
    Expr,
    Gen,
    Role,
    RoleBegin,
    RoleEnd,
    Sampling,
    ScopeBegin,
    ScopeEnd,
    Select,
    Unknown,
    join,
    joined,
)
from sgl.lang.loop import loop_thread
from sgl.lang.operations import JoinMode
from sgl.lang.prompt import Prompt
from sgl.lang.state import ProgramState, ProgramStates
from sgl.lang.thoughts import NAME_ENDING
from sgl.lang.transcript import Transcript

MIN_CACHED_CHARS = 64  # less is not worth a request

_local = threading.local()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Value(Unknown):
    """A variable, of the state that a trace stands for."""

    source: Trace


@dataclass(frozen=True, slots=True, eq=False)
class Forked:
    """Copies that go on side by side."""

    copies: tuple[Trace, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Copies come back."""

    forked: Forked
    mode: JoinMode


@dataclass(frozen=True, slots=True, eq=False)
class Assigned:
    """A variable that the program sets itself."""

    name: str
    value: Any


Part: TypeAlias = "Expr | str | Forked | Joined | Assigned"


@dataclass(eq=False)
class Trace:
    """What a body added: expressions, arguments by name, and traces of copies.

    all_parts  those of copies too, each with its trace, in the order in which they were added
    why_ended  what it could not do without values; None if it came to its end
    """

    all_parts: list[tuple[Trace, Part]] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)
    why_ended: Exception | None = None

    @property
    def parts(self) -> list[Part]:
        """Its own, without those of copies."""
        return [part for source, part in self.all_parts if source is self]

    def add(self, part: Part) -> None:
        self.all_parts.append((self, part))

    def copy(self) -> Trace:
        return Trace(all_parts=self.all_parts, variables=list(self.variables))

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
                yield "  " * depth + _line(part)

    def print_graph(self) -> None:
        print("\n".join(self.lines()))  # noqa: T201


class TracedState:
    """In place of the state: it notes what is added."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __iadd__(self, other: Any) -> TracedState:
        for part in joined(other).parts:
            if isinstance(part, Gen):
                _check_known(part.sampling)
            self._trace.add(part)
            if isinstance(part, Gen | Select) and part.name is not None:
                self._trace.variables.append(part.name)
                if isinstance(part, Gen) and part.thinks_as is not None:
                    self._trace.variables.append(part.name + NAME_ENDING)
        return self

    def __getitem__(self, name: str) -> Value:
        if name not in self._trace.variables:
            raise CannotTraceError(f"no variable {name!r}")
        return Value(name, self._trace)

    get_var = __getitem__

    def __contains__(self, name: str) -> bool:
        return name in self._trace.variables

    def __setitem__(self, name: str, value: Any) -> None:
        inner = value.values() if isinstance(value, dict) else value
        if isinstance(value, list | tuple | set | dict) and any(
            isinstance(one, Unknown) for one in inner
        ):
            raise CannotTraceError(f"variable {name!r} is made of what has no value")
        self._trace.variables.append(name)
        self._trace.add(Assigned(name, value))

    set_var = __setitem__

    def system(self, said: Any = None) -> Any:
        return self._role("system", said)

    def user(self, said: Any = None) -> Any:
        return self._role("user", said)

    def assistant(self, said: Any = None) -> Any:
        return self._role("assistant", said)

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        self._trace.add(ScopeBegin(name))
        try:
            yield
        finally:
            self._trace.add(ScopeEnd(name))
        self._trace.variables.append(name)

    def fork(self, n: int = 1, position_ids_offset: Any = None) -> TracedStates:
        forked = Forked(tuple(self._trace.copy() for _ in range(n)))
        self._trace.add(forked)
        return TracedStates(forked, self._trace)

    @contextmanager
    def copy(self) -> Iterator[TracedState]:
        yield self.fork(1)[0]

    def _role(self, role: Role, said: Any) -> Any:
        if said is not None:
            return join(RoleBegin(role), said, RoleEnd(role))
        return self._role_scope(role)

    @contextmanager
    def _role_scope(self, role: Role) -> Iterator[None]:
        self._trace.add(RoleBegin(role))
        try:
            yield
        finally:
            self._trace.add(RoleEnd(role))

    def __getattr__(self, name: str) -> Any:
        raise CannotTraceError(f"{name} needs a program that runs")


class TracedStates(list[TracedState]):
    """In place of copies of a state."""

    def __init__(self, forked: Forked, source: Trace) -> None:
        super().__init__(TracedState(copy) for copy in forked.copies)
        self._forked = forked
        self._source = source

    def __iadd__(self, other: Any) -> TracedStates:  # type: ignore[override, misc]
        parts = other if isinstance(other, list | tuple) else [other] * len(self)
        if callable(other):
            parts = [other(index) for index in range(len(self))]
        for state, part in zip(self, parts, strict=True):
            state += part
        return self

    def join(self, mode: JoinMode = "gather_variable") -> None:
        self._source.add(Joined(self._forked, mode))
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
    except (TypeError, AttributeError) as error:  # it needs values from here on
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
    states = {found: state}
    forks: dict[Forked, ProgramStates] = {}

    def known(part: Any) -> Any:
        match part:
            case Argument():
                return arguments[part.name]
            case Value():
                return states[part.source][part.name]
            case _:
                return part

    for source, part in found.all_parts:
        match part:
            case Forked(traces):
                forks[part] = states[source].fork(len(traces))
                states.update(zip(traces, forks[part], strict=True))
            case Joined(forked, mode):
                forks[forked].join(mode)
            case Assigned(name, value):
                states[source][name] = known(value)
            case _:
                states[source] += known(part)


def _check_known(sampling: Sampling) -> None:
    """Raises CannotTraceError where it depends on what has no value."""
    for one in fields(sampling):
        value = getattr(sampling, one.name)
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Unknown):
                raise CannotTraceError(f"gen({one.name}={inner.name}) needs its value")


def _line(part: Part) -> str:
    """For people."""
    match part:
        case Unknown():
            return f"{type(part).__name__}({part.name})"
        case Joined():
            return f"join {part.mode}"
        case Assigned():
            value = part.value
            return f"{part.name} = {value.name if isinstance(value, Unknown) else repr(value)}"
        case _:
            return repr(part)
