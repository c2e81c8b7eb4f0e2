"""Regular expressions as Python reads them, for llguidance, which reads them as Rust does.

\\d        an ASCII digit: of the hundreds of others, the two know different ones
[[&~]     in a class, Rust's operators and classes within classes are plain characters
"""

from __future__ import annotations

from collections.abc import Iterator

PLAIN_IN_CLASS = "[&~"


def as_rust_reads_it(pattern: str) -> str:
    return "".join(_pieces(pattern))


def _pieces(pattern: str) -> Iterator[str]:
    class_begin = -1  # where the first character of a class stands; below 0: outside
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\" and at + 1 < len(pattern):
            yield _escape(pattern[at + 1], is_in_class=class_begin >= 0)
            at += 2
            continue
        if class_begin < 0:
            if char == "[":
                class_begin = at + (2 if pattern[at + 1 : at + 2] == "^" else 1)
            yield char
        elif char == "]" and at > class_begin:  # a first one is the character itself
            class_begin = -1
            yield char
        else:
            yield f"\\{char}" if char in PLAIN_IN_CLASS else char
        at += 1


def _escape(char: str, *, is_in_class: bool) -> str:
    if char == "d":
        return "0-9" if is_in_class else "[0-9]"
    return f"\\{char}"
