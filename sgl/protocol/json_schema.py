"""The types of bodies and answers as JSON schemas, each field with what its docstring says of it.

A docstring describes the fields of its class in a table:

    name       what it means, which may go on in the next line,
               further to the right
    one, two   what both mean
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from inspect import cleandoc
from typing import Any, get_args, get_type_hints, is_typeddict

import msgspec

from sgl.sampling_params import SamplingParams

_PLACE = "#/components/schemas/{name}"
_ROW = re.compile(r"(?P<names>\w+(?:, \w+)*) {2,}(?P<text>\S.*)")
_MORE = re.compile(r" {4,}(?P<text>\S.*)")


def reference(name: str) -> dict[str, Any]:
    return {"$ref": _PLACE.format(name=name)}


def schemas_of(types: Iterable[Any]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """A schema for each of `types`, and the components they refer to, by class name."""
    types = list(types)
    schemas, components = msgspec.json.schema_components(types, ref_template=_PLACE)
    for found in _classes(types, set()):
        _describe(components[found.__name__], found)
    return list(schemas), components


def field_texts(found: type) -> dict[str, str]:
    """What is said of each field, by the class or one that it inherits from.

    A field named as a sampling parameter is one, unless its own class says otherwise.
    """
    texts = _table(SamplingParams)[1]
    for base in reversed(found.__mro__):
        texts |= _table(base)[1]
    return texts


def _classes(types: Iterable[Any], seen: set[Any]) -> Iterator[type]:
    """All structs and typed dictionaries in `types`, each once."""
    for found in types:
        if not (is_typeddict(found) or (isinstance(found, type) and _is_struct(found))):
            yield from _classes(get_args(found), seen)
        elif found not in seen:
            seen.add(found)
            yield found
            yield from _classes(get_type_hints(found).values(), seen)


def _is_struct(found: type) -> bool:
    return issubclass(found, msgspec.Struct)


def _describe(schema: dict[str, Any], found: type) -> None:
    del schema["title"]
    schema["description"] = _table(found)[0]
    texts = field_texts(found)
    for name, value in schema["properties"].items():
        if name in texts:
            value["description"] = texts[name]
        if value.get("default", 0) is None:  # stands for "not given"
            del value["default"]


def _table(found: type) -> tuple[str, dict[str, str]]:
    """What a docstring says of its class, and of each field."""
    lines = cleandoc(found.__dict__.get("__doc__") or "").splitlines()
    words: list[str] = []
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        if row := _ROW.fullmatch(line):
            names = row["names"].split(", ")
            texts |= dict.fromkeys(names, row["text"])
        elif names and (more := _MORE.fullmatch(line)):
            texts |= {name: f"{texts[name]} {more['text']}" for name in names}
        else:
            names = []
            words.append(line)
    return " ".join(filter(None, words)), texts
