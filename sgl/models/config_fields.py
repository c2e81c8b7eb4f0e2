"""The entries of a config.json: every one is read with the type it must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from sgl.errors import ConfigError

T = TypeVar("T")

_ROPE_NAMES = {"type": "rope_type"}  # of rope_scaling, to the name used today


class Fields:
    """A table of a config file; a missing or wrong entry is a ConfigError that names it.

    An entry that is null counts as missing.
    """

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self._values = values
        self.source = source

    @classmethod
    def from_json(cls, path: Path) -> Fields:
        """The entries of a file, in the spelling of transformers 5 whoever wrote it."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} should hold a JSON object, not {type(values).__name__}")
        return cls(_modern(values), source=str(path))

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all entries, those that are null included."""
        return tuple(self._values)

    def overridden_by(self, overrides: Mapping[str, object]) -> Fields:
        """These entries, with others in their place; of the rope parameters, one by one."""
        changes = _modern(overrides)
        merged = {**self._values, **changes}
        if "rope_parameters" in changes:
            rope = _table(self._values.get("rope_parameters"))
            merged["rope_parameters"] = rope | _table(changes["rope_parameters"])
        return Fields(merged, self.source)

    def over(self, defaults: Mapping[str, object]) -> Fields:
        """These entries, and `defaults` where there is none."""
        return Fields({**defaults, **self._values}, self.source)

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self._required(name, self.optional_count(name), default)
        if value == 0:
            raise self._wrong(name, "above 0", value)
        return value

    def optional_count(self, name: str) -> int | None:
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(name, "a whole number", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._values.get(name)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise self._wrong(name, "a number", value)
        return self._required(name, None if value is None else float(value), default)

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self._values.get(name, ())
        if not isinstance(values, list | tuple) or not all(isinstance(x, float) for x in values):
            raise self._wrong(name, "a list of numbers", values)
        return tuple(values)

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: str) -> str:
        return self.optional_text(name) or default

    def optional_text(self, name: str) -> str | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._values.get(name) or ()
        if not isinstance(values, list | tuple) or not all(isinstance(x, str) for x in values):
            raise self._wrong(name, "a list of strings", values)
        return tuple(values)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; a single one counts as a list of one, null as none."""
        value = self._values.get(name)
        values = value if isinstance(value, list | tuple) else () if value is None else (value,)
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in values):
            raise self._wrong(name, "a whole number or a list of them", value)
        return tuple(values)

    def table(self, name: str) -> Fields:
        """A nested table; an empty one where there is none."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return Fields(value or {}, f"{self.source}: {name}")

    def _required(self, name: str, value: T | None, default: T | None) -> T:
        found = default if value is None else value
        if found is None:
            raise ConfigError(f"{self.source} has no {name!r}")
        return found

    def _wrong(self, name: str, wanted: str, value: object) -> ConfigError:
        return ConfigError(f"{self.source}: {name} should be {wanted}, not {value!r}")


def _modern(values: Mapping[str, object]) -> dict[str, object]:
    """The same entries, with `torch_dtype` as `dtype` and all about rope in `rope_parameters`."""
    modern = dict(values)
    if "torch_dtype" in modern:
        modern.setdefault("dtype", modern.pop("torch_dtype"))
    rope: dict[str, object] = {}
    if modern.get("rope_theta") is not None:
        rope["rope_theta"] = modern.pop("rope_theta")
    if "rope_scaling" in modern:
        scaling = _table(modern.pop("rope_scaling")) or {"rope_type": "default"}
        rope |= {_ROPE_NAMES.get(name, name): value for name, value in scaling.items()}
    if rope:
        modern["rope_parameters"] = rope | _table(modern.get("rope_parameters"))
    return modern


def _table(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, dict) else {}
