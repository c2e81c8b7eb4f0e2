"""One program while it runs: its text, its variables, and what is still to be done, in order.

    program's thread ── submit ──▶ to do ── on the loop ──▶ backend
                        text alone, while nothing waits, is done at once

Every change wakes whoever waits for one: a reader of a variable, an iterator over the text.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgl.errors import ProgramAbortedError, UnknownVariableError
from sgl.lang import waiting
from sgl.lang.backends.base import Backend
from sgl.lang.ir import (
    Argument,
    Gen,
    Join,
    Role,
    RoleBegin,
    RoleEnd,
    Sampling,
    ScopeBegin,
    ScopeEnd,
    Select,
)
from sgl.lang.loop import loop_thread
from sgl.lang.operations import AT_ONCE, Fork, Gather, Operation, Variable
from sgl.lang.prompt import Answer
from sgl.lang.thoughts import NAME_ENDING, Split
from sgl.lang.transcript import Said, Transcript

logger = logging.getLogger(__name__)

MIN_PRUNED = 16
MIN_PREFILLED_CHARS = 128  # copies sooner compute less than that each than wait for another request


@dataclass(frozen=True, slots=True)
class Settings:
    """What all states of a run share.

    is_streamed  answers come piece by piece, and the body runs on a thread of its own
    is_inline    every operation is waited for
    """

    program: str
    backend: Backend
    defaults: Sampling
    is_streamed: bool = False
    is_inline: bool = False


class Execution:
    """
    variables   declared when the operation that will set them is added
    fork_point  characters of the text that come from the state it was forked from
    body        the thread that adds to it; 0 before it has begun
    is_abandoned, is_error_read   nobody can read from it any more; the error has been told
    """

    __slots__ = (
        "_copies",
        "_declared_role",
        "_is_working",
        "_lock",
        "_most_copies",
        "_open_scopes",
        "_scopes",
        "_task",
        "_to_do",
        "_waiters",
        "body",
        "error",
        "fork_point",
        "is_abandoned",
        "is_ended",
        "is_error_read",
        "said",
        "settings",
        "variables",
    )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.said = Transcript(settings.backend.chat_template)
        self.variables: dict[str, Variable] = {}
        self.error: BaseException | None = None
        self.is_ended = False
        self.is_abandoned = False
        self.is_error_read = False
        self.fork_point = 0
        self.body = threading.get_ident()
        self._copies: list[Execution] = []
        self._declared_role: Role | None = None
        self._most_copies = MIN_PRUNED  # then those that are done are forgotten
        self._open_scopes: list[Variable] = []  # as the body sees it
        self._scopes: list[tuple[Variable, int]] = []  # as the text does
        self._to_do: list[tuple[Operation, Variable | None]] = []
        self._is_working = False
        self._task: asyncio.Task[None] | None = None
        self._waiters: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    # called by the program and its readers, on any thread but the loop's

    def submit(self, operation: Operation) -> None:
        """Do it after all that came before. Raises what can be known to be wrong already.

        All parts of one expression are there before the first of them is done.
        """
        must_start = False
        try:
            for part in operation.parts if isinstance(operation, Join) else (operation,):
                must_start = self._add(part) or must_start
        finally:
            if must_start:
                loop_thread().loop.call_soon_threadsafe(self.start)
            self._changed()
        if self.settings.is_inline:
            self.sync()

    def declare(self, name: str, *, is_gathered: bool = False) -> Variable:
        """A variable that will be set; one of this name that was there is read no more."""
        variable = self.variables[name] = Variable(is_gathered=is_gathered)
        if self.error is not None:
            variable.fail(self.error)
        return variable

    def set_variable(self, name: str, value: Any) -> None:
        variable = self.variables[name] = Variable()
        variable.set(value)
        self._changed()

    def variable(self, name: str) -> Variable:
        """Set or failed; raises UnknownVariableError where nothing sets it."""
        self._check_readable(name)
        self.wait(lambda: self.is_known(name))
        variable = self.variables.get(name)
        if variable is None:
            self.is_error_read = self.error is not None
            raise self.unknown(name) from self.error
        return variable

    def is_known(self, name: str) -> bool:
        """Whether `variable` need not wait."""
        variable = self.variables.get(name)
        if variable is None:  # a streamed body may be about to add what sets it
            return not self.settings.is_streamed or self._is_complete()
        return variable.is_set

    def value(self, name: str) -> Any:
        """As `variable`; raises what made it fail."""
        return self.value_of(self.variable(name), name)

    def value_of(self, variable: Variable, name: str) -> Any:
        if variable.error is not None:
            self.is_error_read = True
            raise self.told(variable.error, name)
        return variable.value

    def unknown(self, name: str) -> UnknownVariableError:
        known = ", ".join(map(str, self.variables)) or "none"
        return UnknownVariableError(
            f"program {self.settings.program!r} has no variable {name!r}; it has: {known}"
        )

    def told(self, error: BaseException, name: str) -> BaseException:
        """The error itself, with a note of where it came up."""
        begin = f"in program {self.settings.program!r}"
        if not any(note.startswith(begin) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{begin}, variable {name!r}")
        return error

    def sync(self) -> None:
        """Waits until everything is done that was added, or will be by a body on another thread."""
        self.wait(self.is_settled)

    async def sync_async(self) -> None:
        """As `sync`, on any event loop."""
        await self.wait_async(self.is_settled)

    def is_settled(self) -> bool:
        """Whether `sync` need not wait."""
        if self._is_working:
            return False
        return not self.settings.is_streamed or self._is_complete()

    def end(self) -> None:
        """The body is over: nothing is added any more, nor to its copies."""
        for execution in self._family():
            execution.is_ended = True
            execution._changed()

    @property
    def is_done(self) -> bool:
        return self.is_ended and not self._is_working

    def when_done(self, call: Callable[[], None]) -> None:
        """Call it once the body is over and everything is done; on any thread."""

        def check() -> None:
            if self.is_done:
                call()
            else:
                self.on_change(check)
                if self.is_ended and not self._is_working:  # since before that
                    self._changed()

        check()

    def cancel(self) -> None:
        """Give up what is not done, in copies too; who reads it gets ProgramAbortedError."""
        self.is_error_read = True
        self.stop(ProgramAbortedError(f"program {self.settings.program!r} was ended"))

    def stop(self, error: BaseException) -> None:
        """As `cancel`; who reads what is not done gets this error."""
        for execution in self._family():
            execution.is_error_read |= execution is not self
            execution.fail(error)
            if (task := execution._task) is not None:
                loop_thread().loop.call_soon_threadsafe(task.cancel)

    def wait(self, is_so: Callable[[], bool], timeout: float | None = None) -> bool:
        """Until something is so; False where it took too long."""
        return waiting.wait(is_so, self.on_change, timeout)

    async def wait_async(self, is_so: Callable[[], bool]) -> None:
        """As `wait`, on any event loop."""
        await waiting.wait_async(is_so, self.on_change)

    def on_change(self, wake: Callable[[], None]) -> None:
        """Call it once, at the next change."""
        with self._lock:
            self._waiters.append(wake)

    def copy(self) -> Execution:
        """One that goes on from here, once a `Fork` of this one has come to it."""
        copy = Execution(self.settings)
        copy.variables = dict(self.variables)
        copy.body, copy._declared_role = self.body, self._declared_role
        copy._open_scopes = list(self._open_scopes)
        copy._is_working = True
        if len(self._copies) >= self._most_copies:
            self._copies = [one for one in self._copies if not one.is_done]
            self._most_copies = max(MIN_PRUNED, 2 * len(self._copies))
        self._copies.append(copy)
        return copy

    def _family(self) -> Iterator[Execution]:
        """This one, its copies, and theirs."""
        left = [self]
        while left:
            yield (execution := left.pop())
            left += execution._copies

    def _add(self, operation: Operation) -> bool:
        """Whether work on the loop must begin; text alone, while nothing waits, is done at once."""
        variable = self._declared(operation)
        with self._lock:
            if self.error is not None:
                _drop(operation, self.error)
                return False
            is_idle = not self._is_working
            if is_idle and isinstance(operation, AT_ONCE):
                self._write(operation, variable)
                return False
            self._to_do.append((operation, variable))
            self._is_working = True
            return is_idle

    def _is_complete(self) -> bool:
        """Whether no variable will be declared any more, as far as this thread can wait for it."""
        return self.is_ended or self.error is not None or threading.get_ident() == self.body

    def _check_readable(self, name: str) -> None:
        """Raises RuntimeError where the body would wait for itself."""
        variable = self.variables.get(name)
        is_open = any(variable is one for one in self._open_scopes)
        if is_open and threading.get_ident() == self.body:
            raise RuntimeError(
                f"variable {name!r} is all that its var_scope says, which has not ended: read it "
                "after"
            )

    def _changed(self) -> None:
        if self._waiters:
            with self._lock:
                waiters, self._waiters = self._waiters, []
            for wake in waiters:
                wake()

    def _declared(self, operation: Operation) -> Variable | None:
        """The variable that it will set."""
        match operation:
            case Gen(str(name), _, thinks_as):
                variable = self.declare(name)
                if thinks_as is not None:
                    variable.thought = self.declare(name + NAME_ENDING)
                return variable
            case Select(str(name)):
                return self.declare(name)
            case ScopeBegin(name):
                self._open_scopes.append(self.declare(name))
                return self._open_scopes[-1]
            case ScopeEnd():
                self._open_scopes.pop()
            case RoleBegin() | RoleEnd():
                self._declare_role(operation)
            case Argument(name):
                raise RuntimeError(f"argument {name!r} has no value: the program is only traced")
        return None

    def _declare_role(self, mark: RoleBegin | RoleEnd) -> None:
        role, begun = mark.role, self._declared_role
        if isinstance(mark, RoleEnd):
            if begun != role:
                raise RuntimeError(f"{role} ends, but it has not begun")
            self._declared_role = None
        elif begun is not None:
            raise RuntimeError(f"{role} begins inside of {begun}: roles cannot be nested")
        else:
            self._declared_role = role

    # on the loop

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        operation: Operation = ""
        try:
            while (job := self._next()) is not None:
                operation, variable = job
                await self._perform(operation, variable)
                self._changed()
        except asyncio.CancelledError:  # by somebody who knows, or because the script ends
            self.is_error_read = True
            self.fail(ProgramAbortedError(f"program {self.settings.program!r} was ended"))
        except Exception as error:
            if isinstance(operation, Gen | Select) and operation.name is not None:
                self.told(error, operation.name)
            self.fail(error)
        finally:
            self._task = None
            self._changed()

    def _next(self) -> tuple[Operation, Variable | None] | None:
        """What must be awaited; text before it is written."""
        with self._lock:
            while self._to_do:
                operation, variable = self._to_do.pop(0)
                if not isinstance(operation, AT_ONCE):
                    return operation, variable
                self._write(operation, variable)
            self._is_working = False
            return None

    def fail(self, error: BaseException) -> None:
        """Nothing more is done; on any thread."""
        with self._lock:
            if self.error is None:
                self.error = error
            dropped, self._to_do = self._to_do, []
            self._is_working = False
            for variable in list(self.variables.values()):  # the body may be adding some
                if not variable.is_set:
                    variable.fail(self.error)
        for operation, _ in dropped:
            _drop(operation, self.error)
        self._changed()
        if self.is_abandoned:
            self.abandon()

    def abandon(self) -> None:
        """Nobody reads from it any more; an error that nobody has read is told in the log."""
        self.is_abandoned = True
        if self.error is not None and not self.is_error_read:
            self.is_error_read = True
            logger.error("program %r failed: %r", self.settings.program, self.error)

    def _write(self, operation: Said | ScopeBegin | ScopeEnd, variable: Variable | None) -> None:
        """What needs no backend."""
        match operation:
            case ScopeBegin():
                assert variable is not None, "it was declared"
                self._scopes.append((variable, len(self.said.text)))
            case ScopeEnd():
                scope, begin = self._scopes.pop()
                scope.set(self.said.text[begin:])
            case _:
                self.said.write(operation)

    async def _perform(self, operation: Operation, variable: Variable | None) -> None:
        match operation:
            case Gen():
                await self._generate(variable or Variable(), operation)
            case Select(_, choices, temperature, method):
                backend, prompt = self.settings.backend, self.said.prompt()
                chosen = await backend.select(prompt, choices, temperature, method)
                self.said.write(chosen.decision)
                if variable is not None:
                    variable.set(chosen.decision, chosen.meta_info)
            case Fork(copies):
                await self._fork(copies)
            case Gather():
                await self._gather(operation)
            case _:
                raise AssertionError(f"no operation: {operation!r}")

    async def _generate(self, variable: Variable, gen: Gen) -> None:
        backend, prompt = self.settings.backend, self.said.prompt()
        if backend.reads_ahead:
            prompt = replace(prompt, ahead=self._ahead())
        wanted = gen.sampling.over(self.settings.defaults)
        split = Split(gen.thinks_as, prompt.text)
        answer = Answer("")
        if not self.settings.is_streamed:
            answer = await backend.generate(prompt, wanted)
        else:
            async for answer in backend.stream(prompt, wanted):
                split.read(answer.text)
                self.said.text = prompt.text + split.said
                variable.value, variable.meta_info = split.said, answer.meta_info
                if variable.thought is not None:
                    variable.thought.value = split.thought
                self._changed()
        split.read(answer.text, is_whole=True)
        self.said.text = prompt.text + split.said
        if split.said == answer.text:  # else the backend's tokens are not those of the text
            self.said.held = answer.held
        if variable.thought is not None:
            variable.thought.set(split.thought, answer.meta_info)
        variable.set(split.said, answer.meta_info)

    def _ahead(self) -> list[str | Gen]:
        """What has been added in the role that has begun, as far as it is known what it says."""
        ahead: list[str | Gen] = []
        with self._lock:
            for operation, _ in self._to_do:
                if not isinstance(operation, str | Gen):
                    break
                ahead.append(operation)
        return ahead

    async def _fork(self, copies: Sequence[Execution]) -> None:
        num_known = max(self.said.held.num_chars, self.said.num_prefilled)
        try:
            if len(copies) > 1 and len(self.said.text) - num_known >= MIN_PREFILLED_CHARS:
                await self.settings.backend.prefill(self.said.prompt())
                self.said.num_prefilled = len(self.said.text)
        except BaseException as error:
            _drop(Fork(copies), error)
            raise
        for copy in copies:
            copy._inherit(self)

    def _inherit(self, parent: Execution) -> None:
        """Begin where the parent is, and do what was added meanwhile."""
        with self._lock:
            if self.error is not None:
                return
            self.said, self.fork_point = parent.said.copy(), len(parent.said.text)
            self._is_working = is_waiting = bool(self._to_do)
        if is_waiting:
            self.start()
        self._changed()

    async def _gather(self, gather: Gather) -> None:
        for copy in gather.copies:
            await copy.wait_async(lambda copy=copy: not copy._is_working)  # type: ignore[misc]
            if copy.error is not None:
                raise copy.error
        if gather.mode == "concate_and_append":
            parts = [copy.said.text[copy.fork_point :] for copy in gather.copies]
            self.said.write("".join(parts))
        for gathered in gather.into:
            gathered.fill()


def _drop(operation: Operation, error: BaseException) -> None:
    """It will not be done: who waits for it must hear of it."""
    if isinstance(operation, Fork):
        for copy in operation.copies:
            copy.is_error_read = True  # whoever reads from the source is told
            copy.fail(error)
