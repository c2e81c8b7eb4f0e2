"""Conversation formats that are no programs: known by name, or read from a `.json` chat template.

    Conversation ── variables ──▶ CONVERSATION_SOURCE ──▶ the prompt's text

One template serves them all; a format only says what stands around the messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from sgl.errors import ConfigError
from sgl.sampling_params import MAX_STOP_CHARS, MAX_TEMPLATE_STOPS


class _Style(NamedTuple):
    """What stands around the roles and the contents; `{sep}` and `{sep2}` are the format's own."""

    after_role: str
    prompt_end: str  # what follows the assistant's role when an answer is asked for
    before_role: str = ""
    system_end: str = "{sep}"
    user_end: str = "{sep}"
    assistant_end: str = "{sep}"
    strips: bool = False
    system_opens_turn: bool = False  # the first user message continues the system's block


_HEADER_END = "<|end_header_id|>\n\n"
STYLES: dict[str, _Style] = {
    "ADD_COLON_SINGLE": _Style(": ", ":"),
    "ADD_COLON_TWO": _Style(": ", ":", assistant_end="{sep2}"),
    "ADD_COLON_SPACE_SINGLE": _Style(": ", ": "),
    "ADD_NEW_LINE_SINGLE": _Style("\n", "\n"),
    "NO_COLON_SINGLE": _Style("", "", system_end=""),
    "NO_COLON_TWO": _Style("", "", system_end="", assistant_end="{sep2}"),
    "CHATML": _Style("\n", "\n", "", "{sep}\n", "{sep}\n", "{sep}\n"),
    "LLAMA2": _Style(" ", "", "", "\n<</SYS>>\n\n", assistant_end="{sep2}", system_opens_turn=True),
    "LLAMA3": _Style(
        _HEADER_END,
        _HEADER_END,
        "<|start_header_id|>",
        "<|eot_id|>",
        "<|eot_id|>",
        "<|eot_id|>",
        strips=True,
    ),
    "MPT": _Style("", ""),
}


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A format without a program: the keys of a `.json` chat template.

    system           opens the system's block; a line end and the message follow
    user, assistant  the roles as they are written
    stop_str         strings that end an answer
    system_message   where the messages have none; empty: no system block
    image            stands for an image; empty: the model takes none
    """

    user: str
    assistant: str
    sep_style: str
    sep: str
    stop_str: tuple[str, ...] | str
    sep2: str = ""
    system: str = ""
    system_message: str = ""
    image: str = ""

    def __post_init__(self) -> None:
        if self.sep_style not in STYLES:
            raise ValueError(f"sep_style is one of {', '.join(STYLES)}, not {self.sep_style!r}")
        if len(self.stop) > MAX_TEMPLATE_STOPS:
            raise ValueError(f"stop_str has {len(self.stop)} strings, at most {MAX_TEMPLATE_STOPS}")
        if not all(0 < len(text) <= MAX_STOP_CHARS for text in self.stop):
            raise ValueError(f"stop_str has strings of 1 to {MAX_STOP_CHARS} characters")

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.stop_str,) if isinstance(self.stop_str, str) else self.stop_str

    @property
    def answer_gap(self) -> str:
        """What comes between the assistant's role, where an answer is asked for, and its text."""
        style = STYLES[self.sep_style]
        return style.after_role.removeprefix(style.prompt_end)

    def begins_with(self, token: str) -> bool:
        """Whether the format's own text brings the token that begins every sequence."""
        before_role = STYLES[self.sep_style].before_role
        return bool(token) and (self.system or before_role + self.user).startswith(token)

    def variables(self) -> dict[str, object]:
        """What CONVERSATION_SOURCE is rendered with."""
        style = STYLES[self.sep_style]
        user, assistant = (style.before_role + role for role in (self.user, self.assistant))
        ends = {"sep": self.sep, "sep2": self.sep2}
        return {
            "system_open": self.system and self.system + "\n",
            "system_message": self.system_message,
            "system_end": style.system_end.format(**ends),
            "user_open": user + style.after_role,
            "user_end": style.user_end.format(**ends),
            "assistant_open": assistant + style.after_role,
            "assistant_end": style.assistant_end.format(**ends),
            "answer_open": assistant + style.prompt_end,
            "system_opens_turn": style.system_opens_turn,
            "strips": style.strips,
            "image": self.image,
        }


CONVERSATION_SOURCE = """
{%- macro text(content) -%}
  {%- if content is string -%}
    {{- content | trim if strips else content -}}
  {%- else -%}
    {%- for part in content or [] -%}
      {%- if part.type == "text" -%}
        {{- part.text -}}
      {%- elif image -%}
        {{- image -}}
      {%- else -%}
        {{- raise_exception("it has no place for a part of type " ~ part.type) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
  {{- raise_exception("it has no place for tools") -}}
{%- endif -%}
{%- set ns = namespace(system=system_message) -%}
{%- for message in messages if message.role in ["system", "developer"] -%}
  {%- set ns.system = text(message.content) -%}
{%- endfor -%}
{%- if ns.system -%}
  {{- system_open + ns.system + system_end -}}
{%- endif -%}
{%- for message in messages if message.role not in ["system", "developer"] -%}
  {%- if message.role == "user" -%}
    {%- if not (loop.first and ns.system and system_opens_turn) -%}
      {{- user_open -}}
    {%- endif -%}
    {{- text(message.content) + user_end -}}
  {%- elif message.role == "assistant" -%}
    {{- assistant_open + text(message.content) + assistant_end -}}
  {%- else -%}
    {{- raise_exception("its roles are system, user and assistant, not " ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- answer_open -}}
{%- endif -%}
"""

_CHATML = Conversation(
    system="<|im_start|>system",
    user="<|im_start|>user",
    assistant="<|im_start|>assistant",
    sep_style="CHATML",
    sep="<|im_end|>",
    stop_str=("<|endoftext|>", "<|im_end|>"),
    system_message="You are a helpful assistant.",
)
_LLAMA_3 = Conversation(
    system="<|start_header_id|>system<|end_header_id|>\n",
    user="user",
    assistant="assistant",
    sep_style="LLAMA3",
    sep="",
    stop_str=("<|end_of_text|>", "<|eot_id|>"),
    system_message="You are a helpful language and vision assistant. You are able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using "
    "natural language.",
)
CONVERSATIONS = {
    "llama-2": Conversation(
        system="[INST] <<SYS>>",
        user="[INST]",
        assistant="[/INST]",
        sep_style="LLAMA2",
        sep=" ",
        sep2=" </s><s>",
        stop_str=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    "chatml": _CHATML,
    "chatml-llava": replace(_CHATML, image="<image>\n"),
    "vicuna_v1.1": Conversation(
        user="USER",
        assistant="ASSISTANT",
        sep_style="ADD_COLON_TWO",
        sep=" ",
        sep2="</s>",
        stop_str=(),
        system_message="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        image="<image>\n",
    ),
    "llama_3_vision": replace(_LLAMA_3, image="<|image|>"),
    "llava_llama_3": replace(_LLAMA_3, image="<image>\n"),
    "internlm2-chat": replace(
        _CHATML, system_message="", stop_str=("<|im_end|>", "<|action_end|>")
    ),
    "qwen2-vl": replace(
        _CHATML, stop_str="<|im_end|>", image="<|vision_start|><|image_pad|><|vision_end|>"
    ),
    "minicpmv": replace(_CHATML, image="(<image>./</image>)"),
}


def read_conversation(file: Path) -> Conversation:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Conversation)
    except msgspec.DecodeError as error:
        raise ConfigError(f"--chat-template {file} is not a conversation format: {error}") from None
