"""Write docs/api/parameters.md from the description of the API, which is made of its types."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from sgl.actors.front import Front, FrontOptions
from sgl.actors.ingress import Ingress
from sgl.actors.openai_calls import ServedModel
from sgl.actors.status_page import SchedulerStatus
from sgl.config import ServerConfig
from sgl.messages import IngressToScheduler

Json: TypeAlias = dict[str, Any]

MANY = 2**31 - 1
PATH = Path(__file__).parent.parent / "docs" / "api" / "parameters.md"

INTRODUCTION = """\
# Parameters

Written by `make docs` from the types that requests are parsed with; a test compares. A running
server tells the same, and the form of every answer, at `/openapi.json`. `null` means not given.
Fields that are not listed are ignored, but in [SamplingParams](#samplingparams) and for
`/start_profile` they are refused.
"""
NOUNS = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "bool",
    "object": "object",
}


def document() -> str:
    described = description()
    components = described["components"]["schemas"]
    parts, shown = [INTRODUCTION], set[str]()
    for heading, operation in operations(described):
        if names := sorted(set(references(operation.get("requestBody", {}))) - shown):
            shown.update(names)
            for name in names:
                parts += [f"## {heading}\n", component_table(components[name])]
        if query := [each for each in operation.get("parameters", ()) if each["in"] == "query"]:
            rows = {each["name"]: each["schema"] for each in query}
            parts += [f"## {heading}\n", table(rows, required=())]
    parts.append("# Objects in them\n")
    for name in inner_names(components, shown):
        parts += [f"## {name}\n", components[name]["description"] + "\n"]
        parts.append(component_table(components[name]))
    return "\n".join(parts)


def description() -> Json:
    """What a server tells that has no keys and no model: it needs neither for this."""
    options = FrontOptions(context_len=1, vocab_size=1, max_live_requests=1, max_batch_requests=1)
    model = ServedModel(
        path="", tokenizer_path="", context_len=1, tokenizer=None, chat_template=None
    )
    front = Front(_Nowhere(), None, options)
    try:
        return Ingress(ServerConfig(), model, front, _Nowhere()).routes.described
    finally:
        front.close()


class _Nowhere:
    """No engine."""

    def put(self, message: IngressToScheduler) -> bool:
        return False

    def read(self) -> SchedulerStatus:
        return SchedulerStatus()


def operations(described: Json) -> Iterator[tuple[str, Json]]:
    """Paths with their methods; of methods that do the same, the one that takes most."""
    for path, item in described["paths"].items():
        bodies = [method for method in item if "requestBody" in item[method]]
        for method in item if len(bodies) < 2 else bodies[:1]:
            names = bodies if method in bodies else [method]
            yield f"{', '.join(map(str.upper, names))} {path}", item[method]


def references(schema: Any) -> Iterator[str]:
    """Names of the components that `schema` itself names."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for part in schema.values():
            yield from references(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from references(part)


def inner_names(components: Json, shown: set[str]) -> Iterator[str]:
    """Components inside those that are shown, and inside these."""
    found = sorted(shown)
    seen = set(shown)
    while found:
        new = [name for name in references(components[found.pop(0)]) if name not in seen]
        for name in dict.fromkeys(new):
            seen.add(name)
            found.append(name)
            yield name


def component_table(schema: Json) -> str:
    return table(schema["properties"], schema["required"])


def table(fields: Json, required: Iterable[str]) -> str:
    rows = [("field", "type", "default", "meaning"), ("---",) * 4]
    for name in sorted(fields, key=lambda name: name not in required):
        schema = fields[name]
        default = "required" if name in required else ""
        if "default" in schema:
            default = f"`{json.dumps(schema['default'])}`"
        rows.append((f"`{name}`", type_text(schema), default, schema["description"]))
    return "".join(f"| {' | '.join(map(_escape, row))} |\n" for row in rows)


def type_text(schema: Json) -> str:
    """A type and its limits in words."""
    if "$ref" in schema:
        [name] = references({"$ref": schema["$ref"]})
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(type_text(each) for each in schema["anyOf"] if each != {"type": "null"})
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_item_text(schema['items'])}{_limits(schema, 'Items', ' entries')}"
    if schema.get("format") == "binary":
        return "file"
    if isinstance(values := schema.get("additionalProperties"), dict):
        return f"object of {_item_text(values)}{_limits(schema, 'Properties', ' entries')}"
    text = NOUNS[schema["type"]] + _limits(schema, "Length", " characters")
    return text + _limits(schema, "imum", "")


def _item_text(schema: Json) -> str:
    text = type_text(schema)
    return f"({text})" if "anyOf" in schema else text


def _limits(schema: Json, kind: str, unit: str) -> str:
    """In parentheses; limits of 32 and more bits are none that anybody needs to know."""
    low, high = schema.get(f"min{kind}"), schema.get(f"max{kind}")
    low = None if low is not None and abs(low) >= MANY else low
    high = None if high is not None and abs(high) >= MANY else high
    if kind == "imum" and "exclusiveMinimum" in schema:
        return f" (above {_number(schema['exclusiveMinimum'])}, up to {_number(high)})"
    if low is None:
        return f" (up to {_number(high)}{unit})" if high is not None else ""
    if high is None:
        return f" (at least {_number(low)}{unit})"
    return f" ({_number(low)} to {_number(high)}{unit})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
    print(f"wrote {PATH}")
