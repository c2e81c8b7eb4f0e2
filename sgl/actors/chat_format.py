"""The chat template of the served model, and how it writes roles."""

from __future__ import annotations

from sgl.protocol.answers import ChatFormat
from sgl.protocol.chat_template import ChatTemplate
from sgl.protocol.role_marks import chat_format
from sgl.tokenizer import Tokenizer


def load_template(name: str | None, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The one asked for, or the model's own."""
    if tokenizer is None:
        return None
    if name is not None:
        return ChatTemplate.load(name, tokenizer.bos_token, tokenizer.eos_token)
    if tokenizer.chat_template is None:
        return None
    return ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)


def format_of(template: ChatTemplate | None, tokenizer: Tokenizer | None) -> ChatFormat | None:
    """None where there is no template, and where it writes roles in no fixed way."""
    if template is None or tokenizer is None:
        return None
    return chat_format(template, tokenizer.bos_token if tokenizer.adds_bos else "")
