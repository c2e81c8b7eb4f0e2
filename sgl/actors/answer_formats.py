"""How the served model writes calls and thoughts: what the flags say, or its chat template."""

from __future__ import annotations

from sgl.actors.prompt_encoder import TextTokenizer
from sgl.config import ServerConfig
from sgl.protocol.answer_format import AnswerFormat, known_markers
from sgl.protocol.openai_chat import Template
from sgl.protocol.reasoning import REASONING_FORMATS
from sgl.protocol.tool_formats import TOOL_FORMATS, ToolFormat, find_format


def answer_format(
    config: ServerConfig, tokenizer: TextTokenizer | None, template: Template | None
) -> AnswerFormat:
    """Without a chat template nobody can ask for calls."""
    if tokenizer is None or template is None:
        return AnswerFormat()
    return AnswerFormat(
        tools=_tool_format(config.tool_call_parser, tokenizer, template.source),
        reasoning=REASONING_FORMATS[config.reasoning_parser] if config.reasoning_parser else None,
        markers=known_markers(lambda text: token_of(tokenizer, text)),
    )


def token_of(tokenizer: TextTokenizer, text: str) -> int | None:
    """The one token that is `text`, if the vocabulary has it."""
    table, wanted = tokenizer.byte_table(False), text.encode()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return next((token_id for token_id in ids if table.get(token_id) == wanted), None)


def _tool_format(name: str, tokenizer: TextTokenizer, template: str) -> ToolFormat | None:
    if name != "auto":
        return TOOL_FORMATS[name]
    return find_format(template, lambda text: token_of(tokenizer, text) is not None)
