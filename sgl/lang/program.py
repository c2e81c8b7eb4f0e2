"""`@function`: a program, and the ways to run it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, overload

from sgl.lang import tracer
from sgl.lang.backends.base import Backend
from sgl.lang.batch import Batch
from sgl.lang.defaults import default_backend
from sgl.lang.execution import Execution, Settings
from sgl.lang.ir import DEFAULTS, Sampling
from sgl.lang.state import ProgramState

Body = Callable[..., Any]
Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Run:
    """One body with its arguments, and the state it works with."""

    body: Body
    arguments: inspect.BoundArguments
    state: ProgramState
    execution: Execution

    def __call__(self) -> None:
        """Raises what the body raises."""
        self.execution.body = threading.get_ident()
        try:
            _, *args = self.arguments.args  # without the state
            self.state.ret_value = self.body(self.state, *args, **self.arguments.kwargs)
        except BaseException as error:
            self.execution.stop(error)
            raise
        finally:
            self.execution.end()

    def quietly(self) -> None:
        """Whoever reads the state gets what the body raises."""
        with suppress(Exception):
            self()


class Function:
    """A program. Its first parameter is the state, `s`; what else it takes are its arguments.

    Keywords that `run` and `run_batch` have themselves cannot be arguments of the program there:
    bind them first.
    """

    def __init__(
        self,
        body: Body,
        num_api_spec_tokens: int | None = None,
        bound: Arguments | None = None,
    ) -> None:
        self.func = body
        self.num_api_spec_tokens = num_api_spec_tokens
        self.bound = dict(bound or {})
        self.__name__ = getattr(body, "__name__", "program")
        self.__doc__ = body.__doc__
        if _is_never_run(body):
            raise TypeError(
                f"{self.__name__} is async, or has a yield: the body of a program is a plain "
                "function, which may be run by many threads or awaited with get_var_async"
            )
        self._signature = inspect.signature(body)
        parameters = list(self._signature.parameters.values())
        assert parameters, f"{self.__name__} needs a first parameter, s: its state"
        assert parameters[0].name == "s", (
            f"the first parameter of {self.__name__} must be s, its state, not {parameters[0].name}"
        )
        named = [p for p in parameters[1:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self.arg_names = [parameter.name for parameter in named]
        self._positional = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
        self._takes_more = len(named) < len(parameters) - 1
        self._num_required = sum(
            parameter.default is parameter.empty and parameter.name not in self.bound
            for parameter in named
        )

    def bind(self, **arguments: Any) -> Function:
        """The same program with some arguments given; raises TypeError where it has none such."""
        if unknown := [name for name in arguments if name not in self.arg_names]:
            raise TypeError(
                f"{self.__name__} has no argument {', '.join(unknown)}; it has "
                f"{', '.join(self.arg_names) or 'none'}"
            )
        return Function(self.func, self.num_api_spec_tokens, self.bound | arguments)

    def run(
        self,
        *args: Any,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        min_p: float = 0.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        ignore_eos: bool = False,
        return_logprob: bool | None = None,
        logprob_start_len: int | None = None,
        top_logprobs_num: int | None = None,
        return_text_in_logprobs: bool | None = None,
        stream: bool = False,
        backend: Backend | None = None,
        use_thread: bool = True,
        **arguments: Any,
    ) -> ProgramState:
        """Run the body here; what it generates may still be going on when this returns.

        The sampling keywords are for every `gen` that does not say otherwise. With `stream`, the
        body runs on a thread of its own and the text is told as it grows. Without `use_thread`
        everything is waited for at once.
        """
        settings = Settings(
            program=self.__name__,
            backend=default_backend(backend, self.num_api_spec_tokens),
            defaults=_defaults(locals()),
            is_streamed=stream,
            is_inline=not use_thread,
        )
        run = self._prepare(settings, self._arguments(args, arguments))
        if stream and use_thread:
            run.execution.body = 0  # not this thread
            threading.Thread(target=run.quietly, name="sgl-program", daemon=True).start()
            return run.state
        try:
            run()
        except BaseException:
            run.execution.cancel()
            raise
        return run.state

    def run_batch(
        self,
        batch_kwargs: Iterable[Arguments | Sequence[Any]],
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        min_p: float = 0.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        ignore_eos: bool = False,
        return_logprob: bool | None = None,
        logprob_start_len: int | None = None,
        top_logprobs_num: int | None = None,
        return_text_in_logprobs: bool | None = None,
        backend: Backend | None = None,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
    ) -> Any:
        """Run it for each of many arguments, side by side: a list of states, in their order.

        The arguments of each run are a dict, or a list of positional ones. At most `num_threads`
        are at work at a time; auto leaves it to the backend. With `generator_style` the states are
        yielded as they get ready, in order. What a body raises is raised here, and ends the others.
        """
        settings = Settings(
            program=self.__name__,
            backend=default_backend(backend, self.num_api_spec_tokens),
            defaults=_defaults(locals()),
        )
        limit = settings.backend.max_programs if num_threads == "auto" else num_threads
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f'num_threads={num_threads!r}: it is "auto" or at least 1')
        arguments = [self._batch_arguments(one) for one in batch_kwargs]

        def start(index: int) -> _Run:
            return self._prepare(settings, arguments[index])

        runs = Batch(start, len(arguments), limit, progress_bar).iterate()
        states = (run.state for run in runs)
        return states if generator_style else list(states)

    def trace(self, **arguments: Any) -> tracer.Trace:
        """What the body adds, with names in place of the arguments that are not given."""
        return tracer.trace(self.func, self.arg_names, self.bound | arguments)

    def cache(self, backend: Backend | None = None) -> str:
        """Compute what all runs begin with, before they come; gives that text."""
        return tracer.cache(self.trace(), default_backend(backend, None))

    def compile(self, *, backend: Backend | None = None) -> Compiled:
        """A program without its Python, which runs what a trace of it says.

        Raises ValueError where the body needs values to go on, such as for an `if`.
        """
        if self._takes_more:
            raise ValueError(f"{self.__name__} cannot be compiled: it takes any arguments (*, **)")
        found = self.trace()
        if found.why_ended is not None:
            raise ValueError(
                f"{self.__name__} cannot be compiled, it needs values: {found.why_ended}"
            ) from found.why_ended
        return Compiled(self, found, backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `run`; inside of a trace, as `trace`."""
        if tracer.is_tracing():
            given = self._arguments(args, kwargs).arguments
            return self.trace(**{name: given[name] for name in self.arg_names if name in given})
        return self.run(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<program {self.__name__}({', '.join(self.arg_names)})>"

    def _prepare(self, settings: Settings, arguments: inspect.BoundArguments) -> _Run:
        execution = Execution(settings)
        return _Run(self.func, arguments, ProgramState(execution), execution)

    def _arguments(self, args: Sequence[Any], kwargs: Arguments) -> inspect.BoundArguments:
        """With None for the state; raises TypeError as Python does for a call."""
        free = [name for name in self._positional if name not in self.bound]
        given = dict(zip(free, args, strict=False))
        if twice := given.keys() & kwargs.keys():
            raise TypeError(f"{self.__name__} got multiple values for argument {min(twice)!r}")
        given = {**self.bound, **given, **kwargs}
        first = list(takewhile(given.__contains__, self._positional))
        leading = [given.pop(name) for name in first]
        return self._signature.bind(None, *leading, *args[len(free) :], **given)

    def _batch_arguments(self, one: Arguments | Sequence[Any]) -> inspect.BoundArguments:
        if isinstance(one, Mapping):
            return self._arguments((), one)
        free = len(self.arg_names) - len(self.bound)
        if len(one) < self._num_required or (len(one) > free and not self._takes_more):
            raise TypeError(
                f"Given arguments mismatch the SGL function signature: {self.__name__} takes "
                f"{self._num_required} to {free}, got {len(one)}"
            )
        return self._arguments(one, {})


class Compiled:
    """What a program adds, whatever its arguments: see `Function.compile`."""

    def __init__(self, source: Function, found: tracer.Trace, backend: Backend | None) -> None:
        signature = inspect.signature(source.func)

        def body(s: ProgramState, *args: Any, **kwargs: Any) -> None:
            given = signature.bind(s, *args, **kwargs)
            given.apply_defaults()
            tracer.replay(found, s, given.arguments)

        body.__name__ = source.__name__
        body.__signature__ = signature  # type: ignore[attr-defined]
        self._trace = found
        self._backend = backend
        self._function = Function(body, source.num_api_spec_tokens, source.bound)

    def run(self, *, backend: Backend | None = None, **kwargs: Any) -> ProgramState:
        return self._function.run(backend=backend or self._backend, **kwargs)

    def run_batch(
        self,
        batch_kwargs: Iterable[Arguments | Sequence[Any]],
        *,
        backend: Backend | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._function.run_batch(batch_kwargs, backend=backend or self._backend, **kwargs)

    def print_graph(self) -> None:
        """What it adds, line by line."""
        self._trace.print_graph()


@overload
def function(func: Body) -> Function: ...
@overload
def function(
    func: None = None, num_api_spec_tokens: int | None = None
) -> Callable[[Body], Function]: ...
def function(
    func: Body | None = None, num_api_spec_tokens: int | None = None
) -> Function | Callable[[Body], Function]:
    """Makes a program of a function whose first parameter is `s`.

    num_api_spec_tokens  with an API: ask once for so many tokens, and use what fits of the answer
                         for the following `gen`s too
    """
    if func is not None:
        return Function(func, num_api_spec_tokens)
    return lambda body: Function(body, num_api_spec_tokens)


def _is_never_run(body: Body) -> bool:
    """Whether a call gives something that somebody must await or iterate."""
    kinds = (
        inspect.iscoroutinefunction,
        inspect.isgeneratorfunction,
        inspect.isasyncgenfunction,
    )
    return any(is_kind(body) for is_kind in kinds)


def _defaults(given: Mapping[str, Any]) -> Sampling:
    """Of `run`'s keywords; what has its neutral value is not sent."""
    from sgl.lang.api import texts

    neutral = {
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "ignore_eos": False,
    }
    said = {name: given[name] for name in _RUN_KEYWORDS if given[name] is not None}
    said = {name: value for name, value in said.items() if neutral.get(name, said) != value}
    if ids := said.get("stop_token_ids"):
        said["stop_token_ids"] = tuple(ids)
    if "stop" in said:
        said["stop"] = texts(said["stop"])
    return Sampling(max_tokens=said.pop("max_new_tokens", DEFAULTS.max_tokens), **said)


_RUN_KEYWORDS = (
    "max_new_tokens",
    "stop",
    "stop_token_ids",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "ignore_eos",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_text_in_logprobs",
)
