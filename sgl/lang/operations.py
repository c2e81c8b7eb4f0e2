"""What is done for a program, in order, and the variables that it sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sgl.lang.ir import Expr, Image, RoleBegin, RoleEnd, ScopeBegin, ScopeEnd, Video

if TYPE_CHECKING:
    from sgl.lang.execution import Execution

JoinMode: TypeAlias = Literal["gather_variable", "concate_and_append"]


class Variable:
    """A value that is there, or will be; `value` grows while it is streamed.

    is_gathered  it is a list of what copies made
    thought      what the model thought before it said this, where that is kept apart
    """

    __slots__ = ("error", "is_gathered", "is_set", "meta_info", "thought", "value")

    def __init__(self, *, is_gathered: bool = False) -> None:
        self.value: Any = ""
        self.meta_info: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self.thought: Variable | None = None
        self.is_gathered = is_gathered
        self.is_set = False

    def set(self, value: Any, meta_info: dict[str, Any] | None = None) -> None:
        self.value, self.meta_info, self.is_set = value, meta_info, True

    def fail(self, error: BaseException) -> None:
        self.error, self.is_set = error, True


@dataclass(frozen=True, slots=True)
class Fork:
    """Copies begin here."""

    copies: Sequence[Execution]


@dataclass(frozen=True, slots=True)
class Gathered:
    """A list of what copies made: that of an earlier join, and then the values of `parts`."""

    variable: Variable
    before: Variable | None
    parts: Sequence[Variable]

    def fill(self) -> None:
        before = [] if self.before is None else self.before.value
        self.variable.set([*before, *(part.value for part in self.parts)])


@dataclass(frozen=True, slots=True)
class Gather:
    """What the copies have made comes back, in their order."""

    copies: Sequence[Execution]
    mode: JoinMode
    into: Sequence[Gathered]


Operation: TypeAlias = "Expr | str | Fork | Gather"
AT_ONCE = (str, RoleBegin, RoleEnd, ScopeBegin, ScopeEnd, Image, Video)  # they need no backend
