"""What a program's body works with: `s`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from sgl.lang.execution import Execution
from sgl.lang.ir import Expr, Role, RoleBegin, RoleEnd, ScopeBegin, ScopeEnd, join, joined
from sgl.lang.operations import Fork, Gather, Gathered, JoinMode, Variable
from sgl.lang.prompt import Message

Addable: TypeAlias = "Expr | str | Sequence[Expr | str]"


class ProgramState:
    """A prompt that grows. Adding to it does not wait; reading from it does."""

    __slots__ = ("_execution", "_ret_value")

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._ret_value: Any = None

    @property
    def ret_value(self) -> Any:
        """What the program's body returned; None where it failed."""
        self.sync()
        return self._ret_value

    @ret_value.setter
    def ret_value(self, value: Any) -> None:
        self._ret_value = value

    def __iadd__(self, other: Addable) -> ProgramState:
        self._execution.submit(joined(other))
        return self

    def __getitem__(self, name: str) -> Any:
        return self._execution.value(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._execution.set_variable(name, value)

    def __contains__(self, name: str) -> bool:
        return name in self._execution.variables

    def get_var(self, name: str) -> Any:
        """A variable's value, once it is there; raises UnknownVariableError, or what failed."""
        return self[name]

    def set_var(self, name: str, value: Any) -> None:
        self[name] = value

    async def get_var_async(self, name: str) -> Any:
        """As `get_var`, on an event loop that goes on meanwhile."""
        await self._execution.wait_async(lambda: self._execution.is_known(name))
        return self[name]

    def get_meta_info(self, name: str, timeout: float | None = None) -> dict[str, Any]:
        """What the backend told about a variable; raises TimeoutError after so many seconds."""
        execution = self._execution
        if not execution.wait(lambda: execution.is_known(name), timeout):
            raise TimeoutError(f"variable {name!r} is not there after {timeout} s")
        self[name]
        return execution.variables[name].meta_info or {}

    def system(self, said: Expr | str | None = None) -> Any:
        """`s += s.system("…")`, or `with s.system(): …`"""
        return self._role("system", said)

    def user(self, said: Expr | str | None = None) -> Any:
        """`s += s.user("…")`, or `with s.user(): …`"""
        return self._role("user", said)

    def assistant(self, said: Expr | str | None = None) -> Any:
        """`s += s.assistant(gen("…"))`, or `with s.assistant(): …`"""
        return self._role("assistant", said)

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        """All text that is added inside becomes a variable."""
        self._execution.submit(ScopeBegin(name))
        try:
            yield
        finally:
            self._execution.submit(ScopeEnd(name))

    def fork(self, n: int = 1, position_ids_offset: Sequence[int] | None = None) -> ProgramStates:
        """Copies that go on side by side; what they share is computed once."""
        if position_ids_offset is not None:
            raise ValueError("position_ids_offset is not supported: leave it out")
        if n < 1:
            raise ValueError(f"fork makes at least 1 copy, not {n}")
        copies = [self._execution.copy() for _ in range(n)]
        self._execution.submit(Fork(copies))
        return ProgramStates([ProgramState(copy) for copy in copies], self)

    @contextmanager
    def copy(self) -> Iterator[ProgramState]:
        """`with s.copy() as c:` one that goes on from here, and leaves this as it is."""
        copy = self.fork(1)[0]
        try:
            yield copy
        finally:
            copy._execution.end()

    def text(self) -> str:
        """All text, once everything that was added is done."""
        self.sync()
        return self._execution.said.text

    def messages(self) -> list[Message]:
        """What was said in roles, as OpenAI's API has it."""
        self.sync()
        return [dict(message) for message in self._execution.said.messages]

    def sync(self) -> None:
        """Wait until everything that was added is done."""
        self._execution.sync()

    async def sync_async(self) -> None:
        """As `sync`, on an event loop that goes on meanwhile."""
        await self._execution.sync_async()

    def error(self) -> BaseException | None:
        """What went wrong, if anything did."""
        self.sync()
        self._execution.is_error_read = True
        return self._execution.error

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """New pieces of the text, or of one variable, as they come with `stream=True`."""
        execution, reader = self._execution, _Reader(self._execution, var_name)
        while not reader.is_over:
            execution.wait(reader.has_news)
            for piece, _ in reader.take():
                yield piece

    async def text_async_iter(
        self, var_name: str | None = None, return_meta_data: bool = False
    ) -> AsyncIterator[Any]:
        """As `text_iter`, on an event loop; with meta data, pairs of a piece and its meta info."""
        execution, reader = self._execution, _Reader(self._execution, var_name)
        while not reader.is_over:
            await execution.wait_async(reader.has_news)
            for piece in reader.take():
                yield piece if return_meta_data else piece[0]

    def __repr__(self) -> str:
        error = self._execution.error
        failed = "" if error is None else f", failed: {error!r}"
        return f"ProgramState({self._execution.said.text}{failed})"

    def __del__(self) -> None:
        self._execution.abandon()

    def _role(self, role: Role, said: Expr | str | None) -> Any:
        if said is not None:
            return join(RoleBegin(role), said, RoleEnd(role))
        return self._role_scope(role)

    @contextmanager
    def _role_scope(self, role: Role) -> Iterator[None]:
        self._execution.submit(RoleBegin(role))
        try:
            yield
        finally:
            self._execution.submit(RoleEnd(role))


class ProgramStates:
    """Copies of a state, side by side."""

    def __init__(self, states: list[ProgramState], source: ProgramState) -> None:
        self._states = states
        self._source = source

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, index: int) -> ProgramState:
        return self._states[index]

    def __setitem__(self, index: int, state: ProgramState) -> None:
        if state is not self._states[index]:  # `forks[i] += …` stores what it got
            raise TypeError("copies of a state cannot be replaced by others")

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self._states)

    def __iadd__(self, other: Addable | Callable[[int], Addable]) -> ProgramStates:
        """The same for all, one of a list for each, or what a function of the index gives."""
        if callable(other):
            parts: Sequence[Any] = [other(index) for index in range(len(self))]
        elif isinstance(other, list | tuple):
            parts = other
        else:
            parts = [other] * len(self)
        if len(parts) != len(self):
            raise ValueError(f"{len(parts)} expressions for {len(self)} copies")
        for state, part in zip(self._states, parts, strict=True):
            state += part
        return self

    def join(self, mode: JoinMode = "gather_variable") -> None:
        """Bring back to the source what the copies have made.

        gather_variable     each new variable becomes a list, in the order of the copies
        concate_and_append  their texts are appended, one after the other
        """
        if mode not in ("gather_variable", "concate_and_append"):
            raise ValueError(f"join(mode={mode!r}): gather_variable or concate_and_append")
        source, copies = self._source._execution, [state._execution for state in self]
        into = _gathered(source, copies) if mode == "gather_variable" else []
        source.submit(Gather(copies, mode, into))
        for copy in copies:
            copy.is_error_read = True  # it fails the source
            copy.end()


class _Reader:
    """How far somebody has read a text that grows."""

    def __init__(self, execution: Execution, name: str | None) -> None:
        self._execution = execution
        self._name = name
        self._found: Variable | None = None
        self._num_read = 0
        self.is_over = False

    def has_news(self) -> bool:
        is_longer = self._execution.settings.is_streamed and len(self._text()) > self._num_read
        return is_longer or self._is_complete()

    def take(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """What is new, with the meta info; at the end, raises what the text failed with."""
        is_complete = self._is_complete()  # asked first: nothing can come between
        text, begin = self._text(), self._num_read
        self._num_read = max(begin, len(text))
        if text[begin:]:
            yield text[begin:], self._meta()
        if is_complete:
            self.is_over = True
            if self._found is not None and self._name is not None:
                self._execution.value_of(self._found, self._name)
            elif self._name is not None:
                self._execution.value(self._name)
            elif self._execution.error is not None:
                self._execution.is_error_read = True
                raise self._execution.error

    def _variable(self) -> Variable | None:
        """The one that had this name first: another one later has another text."""
        if self._name is not None and self._found is None:
            self._found = self._execution.variables.get(self._name)
        return self._found

    def _is_complete(self) -> bool:
        variable = self._variable()
        return self._execution.is_settled() if variable is None else variable.is_set

    def _text(self) -> str:
        if self._name is None:
            return self._execution.said.text
        variable = self._variable()
        return variable.value if variable is not None and isinstance(variable.value, str) else ""

    def _meta(self) -> dict[str, Any] | None:
        variable = self._variable()
        return None if variable is None else variable.meta_info


def _gathered(source: Execution, copies: Sequence[Execution]) -> list[Gathered]:
    """The source's new lists, and which variables of the copies each will have."""
    lists = []
    for name in dict.fromkeys(name for copy in copies for name in copy.variables):
        old = source.variables.get(name)
        parts = [copy.variables[name] for copy in copies if name in copy.variables]
        new = [part for part in parts if part is not old]
        if new and (old is None or old.is_gathered):
            lists.append(Gathered(source.declare(name, is_gathered=True), old, new))
    return lists
