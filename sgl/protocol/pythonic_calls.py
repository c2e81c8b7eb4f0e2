"""Calls written as Python writes them: `[f(a=1), g(b="x")]`, as a whole answer or its beginning."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Collection
from typing import Any

from sgl.protocol.answer_parts import Content, Part, SteppedParser, space_len
from sgl.protocol.bracket_span import PYTHON, BracketSpan, Outcome

JSON_NAMES = {"true": True, "false": False, "null": None}  # which models write among Python's


class PythonicCallParser(SteppedParser):
    """Calls of the functions called `names`; each is told when its bracket has closed."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(self._begin)
        self._names = names
        self._at = 0  # where in the text the call begins
        self._scanned = 0
        self._name = ""
        self._span = BracketSpan(PYTHON)
        self._drops_space = False

    def finish(self) -> list[Part]:
        self._go_on = self._content
        self._content()
        return self._take()

    def _begin(self) -> bool:
        at = space_len(self._text)
        if at == len(self._text):
            return False
        self._at = at + 1
        self._go_on = self._begin_call if self._text[at] == "[" else self._content
        return True

    def _begin_call(self) -> bool:
        at = space_len(self._text, self._at)
        found, bracket, _ = self._text[at:].partition("(")
        if bracket and found in self._names:
            self._name = found
            self._at = self._scanned = at + len(found)
            self._span = BracketSpan(PYTHON)
            self._go_on = self._call
            return True
        if not bracket and any(name.startswith(found) for name in self._names):
            return False
        self._go_on = self._content
        return True

    def _call(self) -> bool:
        outcome, end = self._span.scan(self._text, self._scanned)
        self._scanned = end
        if outcome is Outcome.OPEN:
            return False
        arguments = None
        if outcome is Outcome.CLOSED:
            arguments = read_arguments(self._text[self._at : end])
        if arguments is None:
            self._go_on = self._content
            return True
        self._tell_call(self._name)
        self._tell_arguments(arguments)
        self._text = self._text[end:]
        self._go_on = self._after
        return True

    def _after(self) -> bool:
        at = space_len(self._text)
        if at == len(self._text):
            return False
        if self._text[at] == ",":
            self._at = at + 1
            self._go_on = self._begin_call
        else:
            is_end = self._text[at] == "]"
            self._text = self._text[at + is_end :]
            self._drops_space = True
            self._go_on = self._content
        return True

    def _content(self) -> bool:
        """All the rest."""
        text, self._text = self._text, ""
        if self._drops_space:
            text = text.lstrip()
        self._drops_space = self._drops_space and not text
        self._parts.append(Content(text))
        return False


def read_arguments(text: str) -> str | None:
    """`(a=1, b="x")` as the text of a JSON object; None where it is not that."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about backslashes
            call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            return None
        values = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        if None in values or len(values) < len(call.keywords):
            return None
        arguments = json.dumps(values, ensure_ascii=False, allow_nan=False)
        arguments.encode()
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return arguments


def _literal(node: ast.expr) -> Any:
    """The value of a constant, a list or a dictionary of them; raises ValueError otherwise."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=name) if name in JSON_NAMES:
            return JSON_NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError(f"{type(node).__name__} is no literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("the keys of JSON are strings")
