"""Where chat templates run: jinja's sandbox with a meter on everything that costs.

Templates are programs that come with a model. Each loop step, call and operator looks at the clock
and now and then at the process's memory; what multiplies text (repeating, joining, replacing,
formatting, concatenating) is charged to a budget before it is done. What no hook sees is one single
call over a structure with shared parts: printing a list of ten times the same list of ten times …
Templates written by an attacker are therefore to be rendered in a process that can be killed.
"""

from __future__ import annotations

import json
import mmap
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sgl.errors import InvalidRequestError

TIME_LIMIT_S = 2.0
FREE_CHARS = 1_000_000
CHARS_PER_INPUT_BYTE = 8
BUILT_PER_SHOWN_CHAR = 64  # a template may build this much text for each character it may show
MEMORY_LIMIT = 256 * 1024 * 1024  # bytes the process may grow by while it renders
TICKS_PER_MEMORY_CHECK = 64
MAX_INTEGER_BITS = 10_000
MAX_INDENT = 64
UNMETERED_FILTERS = ("batch", "center", "pprint", "slice", "urlize", "wordwrap", "xmlattr")
UNMETERED_METHODS = ("center", "expandtabs", "ljust", "rjust", "translate", "zfill")


class Meter:
    """What one rendering may use: seconds, memory, characters shown, characters and items built."""

    def __init__(self, num_input_bytes: int) -> None:
        self._deadline_s = time.monotonic() + TIME_LIMIT_S
        self._num_showable = FREE_CHARS + CHARS_PER_INPUT_BYTE * num_input_bytes
        self._num_buildable = BUILT_PER_SHOWN_CHAR * self._num_showable
        self._num_ticks = 0
        self._num_pages_at_start = _num_resident_pages()

    def tick(self) -> None:
        """At each step of a loop and each call: little happens between two ticks."""
        if time.monotonic() > self._deadline_s:
            raise InvalidRequestError(f"the chat template takes longer than {TIME_LIMIT_S:g} s")
        self._num_ticks += 1
        if self._num_ticks % TICKS_PER_MEMORY_CHECK == 0:
            num_new_pages = _num_resident_pages() - self._num_pages_at_start
            if num_new_pages * mmap.PAGESIZE > MEMORY_LIMIT:
                raise InvalidRequestError("the chat template uses too much memory")

    def build(self, num_items: int) -> None:
        """Before so many characters or items are made in one go."""
        self._num_buildable -= num_items
        if self._num_buildable < 0:
            raise InvalidRequestError("the chat template builds far more text than it was given")

    def collect(self, chunks: Iterable[str]) -> str:
        """The text of all chunks, unless it gets too long."""
        shown: list[str] = []
        for chunk in chunks:
            self.tick()
            self._num_showable -= len(chunk)
            if self._num_showable < 0:
                raise InvalidRequestError("the chat template makes too long a prompt")
            shown.append(chunk)
        return "".join(shown)


def _num_resident_pages() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1])


_METER: ContextVar[Meter] = ContextVar("meter")


def render_metered(
    template: jinja2.Template, variables: Mapping[str, object], num_input_bytes: int
) -> str:
    """The text of a template made by a `TemplateSandbox`. The limits grow with its input."""
    meter = Meter(num_input_bytes)
    token = _METER.set(meter)
    try:
        return meter.collect(template.generate(variables))
    finally:
        _METER.reset(token)


class _MeteredCode(CodeGenerator):
    """Lets `for` and `~` pass by the environment, where they are metered."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        node.iter = _environment_call("steps", [node.iter], node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.visit_Call(_environment_call("joined", node.nodes, node.lineno), frame)


def _environment_call(name: str, arguments: list[Any], lineno: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, arguments, [], None, None, lineno=lineno)


class _GenerationBlock(Extension):
    """`{% generation %}` marks answers for training; here its body is only printed."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Renders as Hugging Face does, within the limits of the current meter."""

    code_generator_class: type[CodeGenerator] = _MeteredCode
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = [_GenerationBlock, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        for name in UNMETERED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {"join": _join, "replace": _replace, "format": _format_printf}
        self.filters |= {"indent": _indent, "tojson": _tojson}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.concat = _concat  # type: ignore[method-assign]

    def steps(self, items: Iterable[object]) -> Iterator[object]:
        """Every `for` of a template walks through this."""
        meter = _METER.get()
        for item in items:
            meter.tick()
            yield item

    def joined(self, *values: object) -> str:
        """The value of `a ~ b`."""
        return _concat(map(str, values))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in UNMETERED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _METER.get().tick()
        if isinstance(__obj, BuiltinMethodType | MethodType) and isinstance(__obj.__self__, str):
            if __obj.__name__ == "join":
                return _join(__self, args[0], d=__obj.__self__)
            if __obj.__name__ == "replace":
                return _replace(__obj.__self__, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format_safely = super().wrap_str_format(value)
        if format_safely is None:
            return None

        def format_metered(*args: object, **kwargs: object) -> str:
            _METER.get().build(_format_cost(str(value.__self__), (args, kwargs)))
            return format_safely(*args, **kwargs)

        return format_metered

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        meter.tick()
        if operator == "+":
            meter.build(_len(left) + _len(right))
        elif operator == "%" and isinstance(left, str):
            meter.build(_format_cost(left, right))
        elif operator == "*":
            meter.build(_product_cost(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_integer(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)


def _concat(parts: Iterable[str]) -> str:
    parts = list(parts)
    _METER.get().build(sum(map(len, parts)))
    return "".join(parts)


@pass_environment
def _join(
    environment: jinja2.Environment,
    value: Iterable[object],
    d: str = "",
    attribute: str | int | None = None,
) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    texts = [str(item) for item in value]
    _METER.get().build(sum(map(len, texts)) + len(d) * len(texts))
    return str(d).join(texts)


def _replace(s: object, old: object, new: object, count: int | None = None) -> str:
    text = str(s)
    num_found = text.count(str(old))
    _METER.get().build(len(text) + num_found * len(str(new)))
    return text.replace(str(old), str(new), -1 if count is None else count)


def _format_printf(value: object, *args: object, **kwargs: object) -> str:
    text = str(value)
    _METER.get().build(_format_cost(text, kwargs or args))
    return text % (kwargs or args)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    width_len = width if isinstance(width, int) else len(width)
    _METER.get().build(len(s) + (s.count("\n") + 1) * width_len)
    return do_indent(s, width, first, blank)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own, this leaves <, > and & as they are: a prompt is no HTML page."""
    if indent is not None and indent > MAX_INDENT:
        raise InvalidRequestError(f"the chat template indents JSON by more than {MAX_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _format_cost(text: str, values: object) -> int:
    """At most so many characters come out: each field as long as all values, and every width."""
    if _WIDTH_FROM_VALUE.search(text):
        raise InvalidRequestError("the chat template takes the width of a field from a value")
    widths = sum(int(digits) for digits in _DIGITS.findall(text))
    return len(text) + widths + (text.count("%") + text.count("{")) * _len_shown(values)


_DIGITS = re.compile("[0-9]+")
_WIDTH_FROM_VALUE = re.compile(r"%[^%a-zA-Z]*\*|(?<!\{)(?:\{\{)*\{[^{}]*\{")


def _len_shown(value: object) -> int:
    if isinstance(value, dict):
        return sum(map(_len_shown, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(_len_shown, value))
    return len(str(value))


def _product_cost(left: object, right: object) -> int:
    if isinstance(left, int) and isinstance(right, int):
        _check_integer(left.bit_length() + right.bit_length())
        return 0
    sequence, count = (left, right) if isinstance(right, int) else (right, left)
    return _len(sequence) * max(0, count) if isinstance(count, int) else 0


def _check_integer(num_bits: int) -> None:
    if num_bits > MAX_INTEGER_BITS:
        raise InvalidRequestError("the chat template computes with far too large an integer")


def _len(value: object) -> int:
    return len(value) if isinstance(value, _SIZED) else 0


_SIZED = (str, list, tuple)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
