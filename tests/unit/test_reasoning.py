"""Thoughts are told from answers, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl.protocol.answer_parts import Content, Thought, joined
from sgl.protocol.reasoning import (
    CLOSE,
    OPEN,
    REASONING_FORMATS,
    ReasoningParser,
    Thinking,
    thinking_after,
    thinking_in,
)

THOUGHTS = [
    ("deepseek-r1", "Hm.\n</think>\n\nYes. ", "Hm.", "Yes. "),
    ("deepseek-r1", "<think>\nHm. <b>\n</think>Yes", "Hm. <b>", "Yes"),
    ("deepseek-r1", "\n", "", ""),
    ("deepseek-r1", "Hm </thi", "Hm </thi", ""),
    ("deepseek-r1", "Hm \n", "Hm", ""),
    ("deepseek-r1", "</think>Yes </think> no", "", "Yes </think> no"),
    ("qwen3", "<think>\n\n</think>\n\nYes", "", "Yes"),
    ("qwen3", "\n<think>a < b</think>", "a < b", ""),
    ("qwen3", " <thin", "", " <thin"),
    ("qwen3", "Yes <think>no</think>", "", "Yes <think>no</think>"),
    ("qwen3", "", "", ""),
]


@pytest.mark.parametrize(("form", "text", "thoughts", "content"), THOUGHTS)
@pytest.mark.parametrize("is_whole", [True, False])
def test_thoughts_are_told_apart_however_the_text_is_cut(form, text, thoughts, content, is_whole):
    parser = ReasoningParser(thinking_after("", REASONING_FORMATS[form]))
    parts = [part for piece in ([text] if is_whole else text) for part in parser.feed(piece)]
    parts = joined(parts + parser.finish())
    wanted = [part for part in (Thought(thoughts), Content(content)) if part.text]
    assert parts == wanted


PIECES = [OPEN, CLOSE, "<", "<think", "/think>", " ", "\n", "text", "ü"]


@given(
    text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    thinking=st.sampled_from(Thinking),
    cut=st.integers(0, 60),
)
def test_any_text_has_the_same_thoughts_in_any_pieces(text, thinking, cut):
    read_as = []
    for pieces in ([text], [text[:cut], text[cut:]], text):
        parser = ReasoningParser(thinking)
        parts = [part for piece in pieces for part in parser.feed(piece)]
        read_as.append(joined(parts + parser.finish()))
    assert read_as == [read_as[0]] * 3
    if thinking is Thinking.OVER:
        assert read_as[0] == joined([Content(text)])


@pytest.mark.parametrize(
    ("prompt", "form", "thinking"),
    [
        ("<assistant><think>\n", "qwen3", Thinking.BEGUN),
        ("<assistant><think>\n\n</think>\n\n", "qwen3", Thinking.OVER),
        ("<assistant></think>", "deepseek-r1", Thinking.OVER),
        ("<assistant>", "deepseek-r1", Thinking.BEGUN),
        ("<assistant>", "qwen3", Thinking.POSSIBLE),
    ],
)
def test_a_prompt_may_open_or_close_thoughts(prompt, form, thinking):
    assert thinking_after(prompt, REASONING_FORMATS[form]) is thinking


def test_what_a_client_has_begun_may_hold_thoughts():
    assert thinking_in("", Thinking.POSSIBLE) is Thinking.POSSIBLE
    assert thinking_in("Well,", Thinking.POSSIBLE) is Thinking.OVER
    assert thinking_in("Well,", Thinking.BEGUN) is Thinking.BEGUN
    assert thinking_in("<think>Hm", Thinking.POSSIBLE) is Thinking.BEGUN
    assert thinking_in("<think>Hm</think>Yes", Thinking.BEGUN) is Thinking.OVER
