"""What parsers make of a model's text, however it is cut: calls, thoughts, and what is neither."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl.config import FIELD_OPTIONS, ServerConfig
from sgl.protocol.answer_format import AnswerReader
from sgl.protocol.answer_parts import Arguments, CallBegun, Content, Part, Thought, joined
from sgl.protocol.json_calls import HOLD_CHARS
from sgl.protocol.pythonic_calls import read_arguments
from sgl.protocol.reasoning import REASONING_FORMATS, ReasoningParser, Thinking
from sgl.protocol.tool_formats import TOOL_FORMATS, find_format

NAMES = frozenset(("f", "get_weather", "g.h-i"))
CITY = '{"city": "Zürich \\"}{\\" <tool_call>"}'
WEATHER = f'{{"name": "get_weather", "arguments": {CITY}}}'
LLAMA_WEATHER = WEATHER.replace("arguments", "parameters")
F = '{"name": "f", "arguments": {}}'
LONG = '{"text": "' + "x" * (2 * HOLD_CHARS) + '"}'
LONG_F = f'{{"name": "f", "arguments": {LONG}}}'

Call = tuple[str, str]


def read(form: str, pieces: Iterable[str], hold_chars: int = HOLD_CHARS) -> list[Part]:
    parser = TOOL_FORMATS[form].make_parser(NAMES, hold_chars)
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.feed(piece)
    return joined(parts + parser.finish())


def told(parts: list[Part]) -> tuple[str, list[Call]]:
    """The content, and the calls with their arguments."""
    names = [part.name for part in parts if isinstance(part, CallBegun)]
    calls = [
        (name, "".join(p.text for p in parts if isinstance(p, Arguments) and p.index == index))
        for index, name in enumerate(names)
    ]
    return "".join(part.text for part in parts if isinstance(part, Content)), calls


CALLS: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", "", [("get_weather", CITY)]),
    (
        "hermes",
        f"I look.\n<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{F}\n</tool_call>\n",
        "I look.",
        [("get_weather", CITY), ("f", "{}")],
    ),
    ("hermes", f"<tool_call>{F}</tool_call>\n\nDone. ", "Done. ", [("f", "{}")]),
    ("hermes", f"<tool_call>{F}", "", [("f", "{}")]),
    ("hermes", f"<tool_call>{F}</tool_", "", [("f", "{}")]),
    ("hermes", f"<tool_call>{F}<tool_call>{F}", "", [("f", "{}")] * 2),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "\\u0066", "arguments": {}}', "", [("f", "{}")]),
    ("hermes", f"<tool_call>{LONG_F}</tool_call>", "", [("f", LONG)]),
    ("hermes", "", "", []),
    ("hermes", "  \n", "  \n", []),
    ("hermes", "a < b, <tool_ is none <tool_call", "a < b, <tool_ is none <tool_call", []),
    ("mistral", f"[TOOL_CALLS] [{WEATHER}, {F}]", "", [("get_weather", CITY), ("f", "{}")]),
    ("mistral", f"Sure. [TOOL_CALLS][{F}]", "Sure.", [("f", "{}")]),
    ("mistral", f"[TOOL_CALLS] [{F}] and more", "and more", [("f", "{}")]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1, 2]}, "id": "abcdefghi"}]',
        "",
        [("f", '{"a": [1, 2]}')],
    ),
    ("llama3", LLAMA_WEATHER, "", [("get_weather", CITY)]),
    ("llama3", f"\n<|python_tag|>{LLAMA_WEATHER}", "", [("get_weather", CITY)]),
    ("llama3", f"{LLAMA_WEATHER}; {F}", "", [("get_weather", CITY), ("f", "{}")]),
    ("llama3", f"{LLAMA_WEATHER}\n{F}", "", [("get_weather", CITY), ("f", "{}")]),
    ("llama3", f"So: <|python_tag|>{F}", "So:", [("f", "{}")]),
    ("llama3", '{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    ("llama3", f"The JSON {F}", f"The JSON {F}", []),
    ("pythonic", "[f()]", "", [("f", "{}")]),
    (
        "pythonic",
        " [get_weather(city='Zürich (\"x\")', days=-2), g.h-i(a=[1.5, {'b': None}], c=true,)] Ok",
        "Ok",
        [
            ("get_weather", '{"city": "Zürich (\\"x\\")", "days": -2}'),
            ("g.h-i", '{"a": [1.5, {"b": null}], "c": true}'),
        ],
    ),
    ("pythonic", '[f(a="""x(y""")]', "", [("f", '{"a": "x(y"}')]),
]
MALFORMED = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> so'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "no object"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", "<tool_call>f(a=1)</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "argu'),
    ("hermes", '<tool_call>{"color": "red"}</tool_call>'),
    ("hermes", "<tool_call>{}</tool_call> "),
    ("hermes", "<tool_call>" + '{"name":' * 100 + "1" + "}" * 100),
    ("mistral", '[TOOL_CALLS] {"name": "f", "arguments": {}}'),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}'),
    ("mistral", "[TOOL_CALLS] []"),
    ("llama3", '{"name": "Bob", "parameters": {}}'),
    ("llama3", '{"name": "f", "parameters": {}, "age": 3}'),
    ("llama3", '{"answer": 42, "name": "f"}'),
    ("llama3", "{"),
    ("llama3", "<|python_tag|>print(1)"),
    ("pythonic", "[1] is a source"),
    ("pythonic", "[f(a=1"),
    ("pythonic", "[f(a=b)]"),
    ("pythonic", "[f(1)]"),
    ("pythonic", "[f(a=1, a=2)]"),
    ("pythonic", "[f(**{'a': 1})]"),
    ("pythonic", "[f(a=__import__('os'))]"),
    ("pythonic", "[f(a=1e999)]"),
    ("pythonic", "[f(a={1: 2})]"),
    ("pythonic", "[unknown(a=1)]"),
    ("pythonic", "[f(a=" + "[" * 100 + "]" * 100 + ")]"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), CALLS)
@pytest.mark.parametrize("hold_chars", [0, HOLD_CHARS])
def test_calls_are_found_however_the_text_is_cut(form, text, content, calls, hold_chars):
    assert told(read(form, [text], hold_chars)) == (content, calls)
    assert read(form, text, hold_chars) == read(form, [text], hold_chars)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(("form", "text"), MALFORMED)
def test_what_only_looks_like_a_call_is_content(form, text):
    assert told(read(form, [text])) == (text, [])
    assert told(read(form, text)) == (text, [])


PIECES = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", F, WEATHER, LLAMA_WEATHER),
    *('{"name": "f"', ', "arguments": ', "{}", "}", "{", "[", "]", ",", ";", "\n", " ", '"', "\\"),
    *("f(", ")", "a=1", "'x'", "text", "<", "<think>", "</think>", "ü", LONG_F, '{"x": 1}'),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@settings(max_examples=200, deadline=None)
@given(
    form=st.sampled_from(sorted(TOOL_FORMATS)),
    text=TEXTS,
    cuts=st.lists(st.integers(0, 200), max_size=8),
    hold_chars=st.sampled_from([0, 20, HOLD_CHARS]),
)
def test_any_text_is_read_the_same_in_any_pieces(form, text, cuts, hold_chars):
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    parts = read(form, [text], hold_chars)
    assert read(form, pieces, hold_chars) == parts
    assert read(form, text[:400], hold_chars) == read(form, [text[:400]], hold_chars)
    content, calls = told(parts)
    assert [name for name, _ in calls if name not in NAMES] == []
    if not calls:
        assert content == text
    if hold_chars == HOLD_CHARS and LONG_F not in text:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


def test_long_arguments_are_told_while_they_are_written():
    parser = TOOL_FORMATS["hermes"].make_parser(NAMES, HOLD_CHARS)
    begun = f"<tool_call>{LONG_F}"[: HOLD_CHARS + 200]
    call, arguments = parser.feed(begun)
    assert call == CallBegun(0, "f")
    assert LONG.startswith(arguments.text)
    assert len(arguments.text) > HOLD_CHARS
    assert parser.feed("yy") == [Arguments(0, "yy")]
    assert parser.feed('"}}</tool_call> Done') == [Arguments(0, '"}'), Content("Done")]


def test_under_a_grammar_arguments_are_told_from_the_name_on():
    parser = TOOL_FORMATS["hermes"].make_parser(NAMES, 0)
    assert parser.feed('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.feed('{"a') == [CallBegun(0, "f"), Arguments(0, '{"a')]
    assert parser.feed('": 1}}') == [Arguments(0, '": 1}')]


def test_a_long_call_that_breaks_leaves_nothing_out():
    text = f"<tool_call>{LONG_F[:-2]}\x01 and so on"
    content, [(name, arguments)] = told(read("hermes", text))
    assert (name, content) == ("f", "\x01 and so on")
    assert LONG_F.endswith(arguments + "}}")


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("(a='\\d')", {"a": "\\d"}),
        ("(a='x' 'y', b=(1, 2))", {"a": "xy", "b": [1, 2]}),
        ("(a={'b': {'c': False}})", {"a": {"b": {"c": False}}}),
        ("(a=f'{x}')", None),
        ("(a=b'x')", None),
        ("(a={1, 2})", None),
        ("(a=1 + 1)", None),
        ("(a='\\ud800')", None),
        ("(a=" + "9" * 5000 + ")", None),
        ("(a=1) or f(b=2)", None),
    ],
)
def test_python_arguments_are_literals(text, arguments):
    found = read_arguments(text)
    assert (None if found is None else json.loads(found)) == arguments


def test_thoughts_come_before_calls_and_calls_over_the_limit_go():
    thoughts = ReasoningParser(Thinking.BEGUN)
    calls = TOOL_FORMATS["llama3"].make_parser(NAMES, HOLD_CHARS)
    reader = AnswerReader(thoughts, calls, max_calls=1)
    text = f"I may call {F}.</think>\n{F}; {LLAMA_WEATHER}"
    parts = [part for char in text for part in reader.feed(char)] + reader.finish()
    assert joined(parts) == [Thought(f"I may call {F}."), CallBegun(0, "f"), Arguments(0, "{}")]
    assert reader.has_calls


HERMES_TEMPLATE = "{% if tools %}<tool_call>{% endif %}"


@pytest.mark.parametrize(
    ("template", "tokens", "form"),
    [
        (HERMES_TEMPLATE, "", "hermes"),
        (HERMES_TEMPLATE + "<function=", "", None),
        ("{{ tools }}[TOOL_CALLS]", "", "mistral"),
        ("{{ tools }}[TOOL_CALLS][ARGS]", "", None),
        ("{{ tools }}<|python_tag|>", "", "llama3"),
        ("{{ tools }}", "[TOOL_CALLS]", "mistral"),
        ("{{ tools }}", "<tool_call>", None),
        ("{{ tools }}", "<tool_call> </tool_call>", "hermes"),
        ("{{ messages }}", "[TOOL_CALLS]", None),
    ],
)
def test_a_format_is_known_by_its_template_or_its_tokens(template, tokens, form):
    found = find_format(template, tokens.split().__contains__)
    assert (found and found.name) == form


def test_flags_name_the_parsers_that_there_are():
    choices = {option.key: option.flag for option in FIELD_OPTIONS}
    calls, thoughts = choices["tool_call_parser"], choices["reasoning_parser"]
    assert set(calls.choices) == {"auto", *TOOL_FORMATS}
    assert set(thoughts.choices) == set(REASONING_FORMATS)
    assert set(calls.spellings.values()) <= set(TOOL_FORMATS)
    config = ServerConfig.from_argv(["--tool-call-parser", "qwen25"])
    assert config.tool_call_parser == "hermes"
