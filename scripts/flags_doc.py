"""Write docs/flags.md from `ServerConfig` and the tables of accepted and refused options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sgl.compatibility import ACCEPTED, REFUSED
from sgl.config import FIELD_OPTIONS, GROUPS
from sgl.flags import FieldOption, default_text

PATH = Path(__file__).parent.parent / "docs" / "flags.md"

INTRODUCTION = """\
# Flags of the server

Written by `make docs` from `sgl/config.py` and `sgl/compatibility.py`; a test compares.

`sgl serve MODEL --port 30001`, `python -m sgl.launch_server --model-path MODEL --port 30001` and
`sgl.Engine(model_path=MODEL)` take the same flags; `Engine` writes them with underscores.
The beginning of a name will do where it is unambiguous. `--config server.yaml` reads them from a
file, `port: 30001` on a line; the command line wins over the file, the file over the environment,
which may hold the keys alone (`SGL_API_KEY`, `SGL_ADMIN_API_KEY`).
"""

ACCEPTED_INTRODUCTION = """\
## Options of SGLang that change nothing here

They are accepted so that command lines written for SGLang still start.
"""

REFUSED_INTRODUCTION = """\
## Options of SGLang that are refused

The server does not start with them and says why. A value in the second column asks for nothing
that is missing and is let through.
"""


def document() -> str:
    parts = [INTRODUCTION]
    heading_at = {key: heading for heading, key in GROUPS.items()}
    starts = [index for index, each in enumerate(FIELD_OPTIONS) if each.key in heading_at]
    for start, end in zip(starts, [*starts[1:], len(FIELD_OPTIONS)], strict=True):
        parts.append(f"## {heading_at[FIELD_OPTIONS[start].key]}\n")
        rows = map(_field_row, FIELD_OPTIONS[start:end])
        parts.append(_table(("flag", "default", "meaning"), rows))
    accepted = ((_code(each.names), each.why) for each in ACCEPTED)
    parts += [ACCEPTED_INTRODUCTION, _table(("option", "why"), accepted)]
    refused = ((_code(each.names), _code(each.harmless), each.why) for each in REFUSED)
    parts += [REFUSED_INTRODUCTION, _table(("option", "let through", "why"), refused)]
    return "\n".join(parts)


def _field_row(option: FieldOption) -> tuple[str, str, str]:
    meaning = option.flag.help
    if option.flag.choices:
        meaning += f": {_code(option.flag.choices)}"
    if option.flag.env:
        meaning += f"; also from `SGL_{option.flag.env}` or `SGLANG_{option.flag.env}`"
    return _code(option.names), default_text(option), meaning


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_escape(cell) for cell in cells)} |\n" for cells in lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
    print(f"wrote {PATH}")
