"""A model's chat template: messages in, the prompt's text out.

Templates are programs that come with a model, so they run in jinja's sandbox, and metered. Each
loop step, call and operator looks at the clock and now and then at the process's memory; what
multiplies text (repeating, joining, replacing, formatting, concatenating) is charged to a budget
before it is done. What no hook sees is one single call over a structure with shared parts: printing
a list of ten times the same list of ten times … Templates written by an attacker are therefore to
be rendered in a process that can be killed.
"""

from __future__ import annotations

import json
import mmap
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from types import BuiltinMethodType, MethodType
from typing import Any, NamedTuple, NoReturn

import jinja2
import msgspec
import orjson
from jinja2 import nodes, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec.structs import replace

from sgl.errors import ConfigError, InvalidRequestError

TIME_LIMIT_S = 2.0
FREE_CHARS = 1_000_000
CHARS_PER_INPUT_BYTE = 8
BUILT_PER_SHOWN_CHAR = 64  # a template may build this much text for each character it may show
MEMORY_LIMIT = 256 * 1024 * 1024  # bytes the process may grow by while it renders
TICKS_PER_MEMORY_CHECK = 64
MAX_INTEGER_BITS = 10_000
MAX_INDENT = 64
UNMETERED_FILTERS = ("batch", "center", "pprint", "slice", "urlize", "wordwrap", "xmlattr")
UNMETERED_METHODS = ("center", "expandtabs", "ljust", "rjust", "translate", "zfill")

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
        self.needs_special_tokens = conversation is not None
        self._variables: dict[str, object] = {"bos_token": bos_token, "eos_token": eos_token}
        if conversation is not None:
            self._variables |= conversation.variables()
        self._environment = _Environment()
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
        if not file.is_file() or file.suffix not in (".jinja", ".json"):
            raise ConfigError(
                f"--chat-template {name_or_path} is neither a .jinja or .json file nor one of "
                f"{', '.join(CONVERSATIONS)}"
            )
        if file.suffix == ".jinja":
            return cls(file.read_text(encoding="utf-8"), bos_token, eos_token)
        return cls(CONVERSATION_SOURCE, bos_token, eos_token, _read_conversation(file))

    @property
    def reserved_names(self) -> frozenset[str]:
        """What a client's own arguments cannot be called: check before `render(**arguments)`."""
        given = ("self", "messages", "tools", "add_generation_prompt")
        return frozenset((*given, *self._variables, *self._environment.globals))

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
            meter = Meter(len(orjson.dumps([messages, tools, kwargs])))
            token = _METER.set(meter)
            try:
                return meter.collect(self._template.generate(variables))
            finally:
                _METER.reset(token)
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequestError(
                f"the chat template does not accept these messages: {error}", param="messages"
            ) from None


_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class Meter:
    """What one rendering may use: seconds, memory, characters shown, characters and items built."""

    def __init__(self, num_input_bytes: int) -> None:
        self._deadline_s = time.monotonic() + TIME_LIMIT_S
        self._num_showable = FREE_CHARS + CHARS_PER_INPUT_BYTE * num_input_bytes
        self._num_buildable = BUILT_PER_SHOWN_CHAR * self._num_showable
        self._num_ticks = 0
        self._num_pages_at_start = _num_resident_pages()

    def tick(self) -> None:
        """At each step of a loop and each call: little happens between two ticks."""
        if time.monotonic() > self._deadline_s:
            raise InvalidRequestError(f"the chat template takes longer than {TIME_LIMIT_S:g} s")
        self._num_ticks += 1
        if self._num_ticks % TICKS_PER_MEMORY_CHECK == 0:
            num_new_pages = _num_resident_pages() - self._num_pages_at_start
            if num_new_pages * mmap.PAGESIZE > MEMORY_LIMIT:
                raise InvalidRequestError("the chat template uses too much memory")

    def build(self, num_items: int) -> None:
        """Before so many characters or items are made in one go."""
        self._num_buildable -= num_items
        if self._num_buildable < 0:
            raise InvalidRequestError("the chat template builds far more text than it was given")

    def collect(self, chunks: Iterable[str]) -> str:
        """The text of all chunks, unless it gets too long."""
        shown: list[str] = []
        for chunk in chunks:
            self.tick()
            self._num_showable -= len(chunk)
            if self._num_showable < 0:
                raise InvalidRequestError("the chat template makes too long a prompt")
            shown.append(chunk)
        return "".join(shown)


def _num_resident_pages() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1])


_METER: ContextVar[Meter] = ContextVar("meter")


class _MeteredCode(CodeGenerator):
    """Lets `for` and `~` pass by the environment, where they are metered."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        node.iter = _environment_call("steps", [node.iter], node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.visit_Call(_environment_call("joined", node.nodes, node.lineno), frame)


def _environment_call(name: str, arguments: list[Any], lineno: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, arguments, [], None, None, lineno=lineno)


class _GenerationBlock(Extension):
    """`{% generation %}` marks answers for training; here its body is only printed."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Renders as Hugging Face does, within the limits of the current meter."""

    code_generator_class: type[CodeGenerator] = _MeteredCode
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = [_GenerationBlock, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        for name in UNMETERED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {"join": _join, "replace": _replace, "format": _format_printf}
        self.filters |= {"indent": _indent, "tojson": _tojson}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.concat = _concat  # type: ignore[method-assign]

    def steps(self, items: Iterable[object]) -> Iterator[object]:
        """Every `for` of a template walks through this."""
        meter = _METER.get()
        for item in items:
            meter.tick()
            yield item

    def joined(self, *values: object) -> str:
        """The value of `a ~ b`."""
        return _concat(map(str, values))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in UNMETERED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _METER.get().tick()
        if isinstance(__obj, BuiltinMethodType | MethodType) and isinstance(__obj.__self__, str):
            if __obj.__name__ == "join":
                return _join(__self, args[0], d=__obj.__self__)
            if __obj.__name__ == "replace":
                return _replace(__obj.__self__, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format_safely = super().wrap_str_format(value)
        if format_safely is None:
            return None

        def format_metered(*args: object, **kwargs: object) -> str:
            _METER.get().build(_format_cost(str(value.__self__), (args, kwargs)))
            return format_safely(*args, **kwargs)

        return format_metered

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        meter.tick()
        if operator == "+":
            meter.build(_len(left) + _len(right))
        elif operator == "%" and isinstance(left, str):
            meter.build(_format_cost(left, right))
        elif operator == "*":
            meter.build(_product_cost(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_integer(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)


def _concat(parts: Iterable[str]) -> str:
    parts = list(parts)
    _METER.get().build(sum(map(len, parts)))
    return "".join(parts)


@pass_environment
def _join(
    environment: jinja2.Environment,
    value: Iterable[object],
    d: str = "",
    attribute: str | int | None = None,
) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    texts = [str(item) for item in value]
    _METER.get().build(sum(map(len, texts)) + len(d) * len(texts))
    return str(d).join(texts)


def _replace(s: object, old: object, new: object, count: int | None = None) -> str:
    text = str(s)
    num_found = text.count(str(old))
    _METER.get().build(len(text) + num_found * len(str(new)))
    return text.replace(str(old), str(new), -1 if count is None else count)


def _format_printf(value: object, *args: object, **kwargs: object) -> str:
    text = str(value)
    _METER.get().build(_format_cost(text, kwargs or args))
    return text % (kwargs or args)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    width_len = width if isinstance(width, int) else len(width)
    _METER.get().build(len(s) + (s.count("\n") + 1) * width_len)
    return do_indent(s, width, first, blank)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own, this leaves <, > and & as they are: a prompt is no HTML page."""
    if indent is not None and indent > MAX_INDENT:
        raise InvalidRequestError(f"the chat template indents JSON by more than {MAX_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _format_cost(text: str, values: object) -> int:
    """At most so many characters come out: each field as long as all values, and every width."""
    if _WIDTH_FROM_VALUE.search(text):
        raise InvalidRequestError("the chat template takes the width of a field from a value")
    widths = sum(int(digits) for digits in _DIGITS.findall(text))
    return len(text) + widths + (text.count("%") + text.count("{")) * _len_shown(values)


_DIGITS = re.compile("[0-9]+")
_WIDTH_FROM_VALUE = re.compile(r"%[^%a-zA-Z]*\*|(?<!\{)(?:\{\{)*\{[^{}]*\{")


def _len_shown(value: object) -> int:
    if isinstance(value, dict):
        return sum(map(_len_shown, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(_len_shown, value))
    return len(str(value))


def _product_cost(left: object, right: object) -> int:
    if isinstance(left, int) and isinstance(right, int):
        _check_integer(left.bit_length() + right.bit_length())
        return 0
    sequence, count = (left, right) if isinstance(right, int) else (right, left)
    return _len(sequence) * max(0, count) if isinstance(count, int) else 0


def _check_integer(num_bits: int) -> None:
    if num_bits > MAX_INTEGER_BITS:
        raise InvalidRequestError("the chat template computes with far too large an integer")


def _len(value: object) -> int:
    return len(value) if isinstance(value, _SIZED) else 0


_SIZED = (str, list, tuple)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


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

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.stop_str,) if isinstance(self.stop_str, str) else self.stop_str

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


def _read_conversation(file: Path) -> Conversation:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Conversation)
    except msgspec.DecodeError as error:
        raise ConfigError(f"--chat-template {file} is not a conversation format: {error}") from None
