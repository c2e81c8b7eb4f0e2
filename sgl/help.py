"""The text of --help, made from the fields of a config class."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping

from sgl.flags import FieldOption, default_text

INDENT = 8


def help_text(
    options: Iterable[FieldOption], width: int, groups: Mapping[str, str] | None = None
) -> str:
    """Every flag with its default; `groups` is heading -> first field below it."""
    heading_at = {key: heading for heading, key in (groups or {}).items()}
    lines: list[str] = []
    for option in options:
        if option.key in heading_at:
            lines += ["", f"{heading_at[option.key]}:"]
        lines.append("  " + ", ".join(option.names) + _value_name(option))
        lines += textwrap.wrap(
            _describe(option),
            width,
            initial_indent=" " * INDENT,
            subsequent_indent=" " * INDENT,
            break_on_hyphens=False,
        )
    return "\n".join(lines).lstrip("\n")


def _value_name(option: FieldOption) -> str:
    if option.kind is bool:
        return ""
    if option.flag.choices:
        return " {" + ",".join(option.flag.choices) + "}"
    name = option.flag.metavar or {int: "N", float: "X"}.get(option.kind, "TEXT")
    return f" {name} [{name} ...]" if option.is_list else f" {name}"


def _describe(option: FieldOption) -> str:
    text = f"{option.flag.help} (default: {default_text(option)})"
    return f"{text} [${'SGL_' + option.flag.env}]" if option.flag.env else text
