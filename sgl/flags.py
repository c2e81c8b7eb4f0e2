"""Flags: fields of a frozen dataclass that can be typed, kept in a file or passed as keywords.

    --port 30001      command line ── parse_argv ───┐
    port: 30001       file         ── parse_values ─┼──▶ {"port": 30001} ──▶ ServerConfig
    port=30001        Engine(...)  ── parse_values ─┘

Besides the fields an `OptionTable` knows names that older command lines use: `Accepted` ones change
nothing, `Refused` ones stop the start unless their value asks for nothing special.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, assert_never, get_args, get_origin, get_type_hints

from sgl.errors import ConfigError

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | tuple[Scalar, ...] | None
Takes: TypeAlias = Literal["nothing", "one", "many"]

_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """What a field says about its flag besides name, type and default.

    default_text  shown instead of the default, where that is None or depends on something
    spellings     other spellings of a choice -> the choice
    refused       choice people know from elsewhere -> why it is not to be had, what to do
    low, high     allowed range, ends included
    env           also read from the environment variables SGL_<env> and SGLANG_<env>
    """

    help: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    default_text: str = ""
    metavar: str = ""
    env: str = ""
    is_secret: bool = False


def flag(help_text: str, *, default: Value = None, **details: Any) -> Any:
    """A dataclass field that is also a flag; `details` are the fields of `Flag`."""
    described = Flag(help=help_text, **details)
    return field(default=default, repr=not described.is_secret, metadata={"flag": described})


@dataclass(frozen=True, slots=True)
class FieldOption:
    """The flag of one field; `kind` is the type of its value, of a list the type of its entries."""

    key: str
    kind: type
    is_list: bool
    is_optional: bool
    default: Value
    flag: Flag

    @property
    def names(self) -> tuple[str, ...]:
        return ("--" + self.key.replace("_", "-"), *self.flag.aliases)

    @property
    def takes(self) -> Takes:
        if self.is_list:
            return "many"
        return "nothing" if self.kind is bool else "one"

    def read(self, texts: Sequence[str]) -> Value:
        """The value that was typed."""
        if self.kind is bool:
            return True
        values = tuple(map(self._read_one, texts))
        return values if self.is_list else values[0]

    def accept(self, value: object) -> Value:
        """The value that came from a file or a keyword."""
        if value is None and self.is_optional:
            return None
        if not self.is_list:
            return self._accept_one(value)
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{self.names[0]} takes a list, got {value!r}")
        return tuple(map(self._accept_one, value))

    def check(self, value: Value) -> None:
        """Raise ConfigError where a value is none of the choices or out of range."""
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None:
                self._check_one(each)

    def _read_one(self, text: str) -> Scalar:
        try:
            value: Scalar = self.kind(text)
        except ValueError:
            raise self._wrong_kind(text) from None
        return self._respell(value)

    def _accept_one(self, value: object) -> Scalar:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if self.kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, bool | int | float | str) or type(value) is not self.kind:
            raise self._wrong_kind(value)
        return self._respell(value)

    def _check_one(self, value: Scalar) -> None:
        name, known = self.names[0], self.flag
        if str(value) in known.refused:
            raise ConfigError(f"{name} {value}: {known.refused[str(value)]}")
        if known.choices and value not in known.choices:
            raise ConfigError(f"{name} must be one of {', '.join(known.choices)}, got {value!r}")
        if isinstance(value, int | float):
            self._check_range(value)

    def _check_range(self, value: float) -> None:
        low, high = self.flag.low, self.flag.high
        if low is not None and high is not None and not low <= value <= high:
            raise ConfigError(f"{self.names[0]} must be from {low:g} to {high:g}, got {value}")
        if low is not None and not value >= low:
            raise ConfigError(f"{self.names[0]} must be at least {low:g}, got {value}")

    def _respell(self, value: Scalar) -> Scalar:
        return self.flag.spellings.get(value, value) if isinstance(value, str) else value

    def _wrong_kind(self, got: object) -> ConfigError:
        return ConfigError(f"{self.names[0]} takes {_KIND_NAMES[self.kind]}, got {got!r}")


@dataclass(frozen=True, slots=True)
class Accepted:
    """An option that changes nothing, kept so that old command lines still start."""

    names: tuple[str, ...]
    takes: Takes
    why: str


@dataclass(frozen=True, slots=True)
class Refused:
    """An option this release knows but does not have; `harmless` values of it are let through."""

    names: tuple[str, ...]
    takes: Takes
    harmless: tuple[str, ...]
    why: str

    def check(self, name: str, values: Sequence[object]) -> None:
        is_off = all(value in (None, False, "") or str(value) in self.harmless for value in values)
        if self.takes == "nothing" or not is_off:
            raise ConfigError(f"{name}: {self.why}")


Option: TypeAlias = FieldOption | Accepted | Refused


class OptionTable:
    """Every name that may be typed, and what it means.

    elsewhere  names of other servers' options, and what to type here
    """

    def __init__(
        self, options: Iterable[Option], elsewhere: Mapping[str, str] | None = None
    ) -> None:
        self._elsewhere = elsewhere or {}
        self.by_name: dict[str, Option] = {}
        for option in options:
            for name in option.names:
                assert name not in self.by_name, f"two options are called {name}"
                self.by_name[name] = option

    def parse_argv(self, argv: Sequence[str]) -> dict[str, Value]:
        """Field name -> value of everything typed. Unambiguous beginnings of names will do."""
        words = deque(argv)
        values: dict[str, Value] = {}
        while words:
            typed, has_value, inline = words.popleft().partition("=")
            name = self.complete(typed)
            option = self.by_name[name]
            texts = [inline] if has_value else _take_values(words, option.takes)
            _check_count(name, option.takes, texts)
            match option:
                case FieldOption():
                    values[option.key] = option.read(texts)
                case Refused():
                    option.check(name, texts)
                case Accepted():
                    pass
                case _:
                    assert_never(option)
        return values

    def parse_values(self, named: Mapping[str, object]) -> dict[str, Value]:
        """Field name -> value of keywords or of a file's keys; names in full, with `_` or `-`."""
        values: dict[str, Value] = {}
        for key, value in named.items():
            name = "--" + key.replace("_", "-")
            match self.by_name.get(name):
                case FieldOption() as option:
                    values[option.key] = option.accept(value)
                case Refused() as option:
                    if value not in (None, False):
                        option.check(name, value if isinstance(value, list | tuple) else [value])
                case Accepted():
                    pass
                case None:
                    raise ConfigError(f"there is no option {key!r}{self._suggest(name)}")
        return values

    def complete(self, typed: str) -> str:
        """The full name of an option of which at least the beginning was typed."""
        if typed in self.by_name:
            return typed
        if not typed.startswith("--"):
            raise ConfigError(f"unexpected argument {typed!r}: options start with --")
        matches = [name for name in self.by_name if name.startswith(typed)] if typed != "--" else []
        if len({id(self.by_name[name]) for name in matches}) == 1:
            return matches[0]
        if matches:
            raise ConfigError(f"{typed} could mean {' or '.join(matches)}: type more of it")
        raise ConfigError(f"there is no option {typed}{self._suggest(typed)}")

    def _suggest(self, name: str) -> str:
        if name in self._elsewhere:
            return f": {self._elsewhere[name]}"
        taken = (name for name, option in self.by_name.items() if not isinstance(option, Refused))
        words = [known.removeprefix("--") for known in taken]
        close = difflib.get_close_matches(name.removeprefix("--"), words, n=1)
        return f"; did you mean --{close[0]}?" if close else "; --help lists them all"


def field_options(config_class: type) -> list[FieldOption]:
    """The flags of a dataclass, in the order of its fields."""
    types = get_type_hints(config_class)
    return [
        FieldOption(
            key=each.name,
            kind=_plain_type(types[each.name]),
            is_list=get_origin(types[each.name]) is tuple,
            is_optional=type(None) in get_args(types[each.name]),
            default=_default(each),
            flag=each.metadata["flag"],
        )
        for each in dataclasses.fields(config_class)
    ]


def default_text(option: FieldOption) -> str:
    """The default as help and documentation show it."""
    if option.flag.default_text:
        return option.flag.default_text
    match option.default:
        case bool():
            return "off"
        case None | ():
            return "none"
        case tuple() as values:
            return " ".join(map(str, values))
        case _:
            return str(option.default)


def from_environment(
    options: Iterable[FieldOption], environ: Mapping[str, str]
) -> dict[str, Value]:
    """Values of the flags that may come from the environment; SGL_X wins over SGLANG_X."""
    values: dict[str, Value] = {}
    for option in options:
        if not option.flag.env:
            continue
        for variable in (f"SGL_{option.flag.env}", f"SGLANG_{option.flag.env}"):
            if text := environ.get(variable):
                values.setdefault(option.key, option.read([text]))
    return values


def _default(described: dataclasses.Field[Any]) -> Value:
    assert described.default is not dataclasses.MISSING, f"{described.name} has no default"
    default: Value = described.default
    return default


def _plain_type(annotation: Any) -> type:
    """`int` of `int`, of `int | None` and of the list `tuple[int, ...]`."""
    parts = get_args(annotation) or (annotation,)
    [kind] = [part for part in parts if part not in (type(None), Ellipsis)]
    assert kind in _KIND_NAMES, f"a flag cannot be of type {annotation}"
    return kind  # type: ignore[no-any-return]


def _take_values(words: deque[str], takes: Takes) -> list[str]:
    """Move an option's values out of `words`; a word with two dashes is the next option."""
    wanted = {"nothing": 0, "one": 1, "many": len(words)}[takes]
    taken: list[str] = []
    while words and len(taken) < wanted and not words[0].startswith("--"):
        taken.append(words.popleft())
    return taken


def _check_count(name: str, takes: Takes, texts: Sequence[str]) -> None:
    if takes == "nothing" and texts:
        raise ConfigError(f"{name} takes no value, got {texts[0]!r}")
    if takes != "nothing" and not texts:
        raise ConfigError(f"{name} needs a value: {name} VALUE")
