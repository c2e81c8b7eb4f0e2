"""Flags that take several values; the others are tested through the server's (test_config.py)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sgl.errors import ConfigError
from sgl.flags import OptionTable, default_text, field_options, flag
from sgl.help import help_text


@dataclass(frozen=True, kw_only=True)
class Settings:
    sizes: tuple[int, ...] = flag("sizes to try", default=(1, 8), low=1)
    kinds: tuple[str, ...] = flag("kinds", default=(), choices=("a", "b"), spellings={"A": "a"})
    name: str = flag("a name", default="x")


OPTIONS = field_options(Settings)
SIZES, KINDS, NAME = OPTIONS


def parse(*argv: str) -> dict:
    return OptionTable(OPTIONS).parse_argv(argv)


def test_values_end_at_the_next_flag():
    assert parse("--sizes", "2", "4", "--name", "y", "--kinds", "A", "b") == {
        "sizes": (2, 4),
        "name": "y",
        "kinds": ("a", "b"),
    }
    assert parse("--sizes=3") == {"sizes": (3,)}
    assert parse("--sizes", "-3") == {"sizes": (-3,)}


def test_lists_come_from_files_and_keywords_too():
    table = OptionTable(OPTIONS)
    assert table.parse_values({"sizes": [2, 4], "kinds": ("b",)}) == {
        "sizes": (2, 4),
        "kinds": ("b",),
    }
    with pytest.raises(ConfigError, match="--sizes takes a list, got 2"):
        table.parse_values({"sizes": 2})
    with pytest.raises(ConfigError, match="--sizes takes a whole number, got 'two'"):
        table.parse_values({"sizes": ["two"]})


def test_every_value_is_checked():
    SIZES.check((1, 2))
    KINDS.check(())
    with pytest.raises(ConfigError, match="--sizes must be at least 1, got 0"):
        SIZES.check((4, 0))
    with pytest.raises(ConfigError, match="--kinds must be one of a, b, got 'c'"):
        KINDS.check(("a", "c"))
    with pytest.raises(ConfigError, match="--sizes takes a whole number, got 'x'"):
        parse("--sizes", "1", "x")
    with pytest.raises(ConfigError, match="--sizes needs a value"):
        parse("--sizes", "--name", "y")


def test_help_shows_that_a_flag_takes_several():
    assert (default_text(SIZES), default_text(KINDS), default_text(NAME)) == ("1 8", "none", "x")
    lines = help_text(OPTIONS, 80).splitlines()
    assert lines[0] == "  --sizes N [N ...]"
    assert "  --name TEXT" in lines
