"""A model's chat template: messages in, the prompt's text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import orjson

from sgl.errors import ConfigError, InvalidRequestError
from sgl.protocol.conversations import (
    CONVERSATION_SOURCE,
    CONVERSATIONS,
    Conversation,
    read_conversation,
)
from sgl.protocol.template_sandbox import TemplateSandbox, render_metered

PROVIDED_NAMES = frozenset(("self", "messages", "tools", "add_generation_prompt"))

Message = Mapping[str, Any]


class ChatTemplate:
    """A template, compiled once; `render` may be called from several threads.

    stop                   strings that end an answer; part of a built-in conversation format
    needs_special_tokens   the rendered text has no beginning-of-sequence token: the tokenizer adds
                           its own (encode with add_special_tokens=True); otherwise it must not
    """

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        conversation: Conversation | None = None,
    ) -> None:
        self.source = source
        self.stop = () if conversation is None else conversation.stop
        self.needs_special_tokens = conversation is not None and not conversation.begins_with(
            bos_token
        )
        self._answer_gap = "" if conversation is None else conversation.answer_gap
        self._variables: dict[str, object] = {"bos_token": bos_token, "eos_token": eos_token}
        if conversation is not None:
            self._variables |= conversation.variables()
        self._environment = TemplateSandbox()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(
                f"the chat template cannot be read: {error}. Mend it, or give another one with "
                "--chat-template"
            ) from None

    @classmethod
    def load(cls, name_or_path: str, bos_token: str = "", eos_token: str = "") -> ChatTemplate:
        """A built-in conversation format by name, or a `.jinja` or `.json` file."""
        if name_or_path in CONVERSATIONS:
            conversation = CONVERSATIONS[name_or_path]
            return cls(CONVERSATION_SOURCE, bos_token, eos_token, conversation)
        file = Path(name_or_path)
        if file.suffix in (".jinja", ".json") and not file.is_file():
            raise ConfigError(f"--chat-template {name_or_path}: there is no file {file.absolute()}")
        if not file.is_file() or file.suffix not in (".jinja", ".json"):
            raise ConfigError(
                f"--chat-template {name_or_path} is neither a .jinja or .json file nor one of "
                f"{', '.join(CONVERSATIONS)}"
            )
        if file.suffix == ".jinja":
            return cls(file.read_text(encoding="utf-8"), bos_token, eos_token)
        return cls(CONVERSATION_SOURCE, bos_token, eos_token, read_conversation(file))

    @property
    def reserved_names(self) -> frozenset[str]:
        """What a client's own arguments cannot be called: check before `render(**arguments)`."""
        return PROVIDED_NAMES.union(self._variables, self._environment.globals)

    def render(
        self,
        messages: Sequence[Message],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt. Raises InvalidRequestError where template and messages do not go together."""
        for name in sorted(self.reserved_names.intersection(kwargs)):
            raise InvalidRequestError(
                f"chat_template_kwargs cannot set {name!r}: the server does", param=name
            )
        variables = {
            **self._variables,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            num_input_bytes = len(orjson.dumps([messages, tools, kwargs]))
            return render_metered(self._template, variables, num_input_bytes)
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequestError(
                f"the chat template does not accept these messages: {error}", param="messages"
            ) from None

    def begin_answer(self, text: str) -> str:
        """The beginning of an answer that the client gave, to follow on a prompt."""
        has_gap = not text or text.startswith(self._answer_gap)
        return text if has_gap else self._answer_gap + text


_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
