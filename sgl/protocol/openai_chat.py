"""`/v1/chat/completions`: messages to a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from msgspec import Meta

from sgl.errors import InvalidRequestError
from sgl.messages import LogprobOptions
from sgl.protocol.answer_format import AnswerFormat, Reading
from sgl.protocol.body import NumTopLogprobs, convert, parse_fields, refuse_unsupported
from sgl.protocol.call import GenerationCall, PromptCall
from sgl.protocol.chat_template import PROVIDED_NAMES
from sgl.protocol.openai import (
    NOT_YET,
    Frame,
    SamplingBody,
    Server,
    frame,
    namespace,
    sampling_params,
)
from sgl.protocol.openai_grammar import grammar_of
from sgl.protocol.openai_messages import Message, template_messages
from sgl.protocol.reasoning import Thinking, thinking_after, thinking_in
from sgl.protocol.tools import ChosenTool, Tool, ToolUse, tool_use
from sgl.sampling_params import NumTokens, SamplingParams, Temperature

DEFAULT_TEMPERATURE = 0.7
MAX_MESSAGES = 4096
MAX_TEMPLATE_OPTIONS = 16


class Template(Protocol):
    """What turns messages to a prompt."""

    @property
    def source(self) -> str: ...

    @property
    def stop(self) -> tuple[str, ...]: ...

    @property
    def needs_special_tokens(self) -> bool:
        """The rendered text has no beginning-of-sequence token: the tokenizer adds its own."""

    def render(
        self,
        messages: list[dict[str, Any]],
        /,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str: ...

    def begin_answer(self, text: str) -> str:
        """The beginning of an answer that the client gave, to follow on a prompt."""


class ChatBody(SamplingBody, kw_only=True):
    """The fields of `/v1/chat/completions` besides the shared ones.

    messages               the chat so far; a last one of the assistant is continued
    max_tokens             of an answer; if not given, it may fill the context
    max_completion_tokens  the newer name of max_tokens, which it wins over
    logprobs               tell the log-probability of each token
    top_logprobs           and of so many of the likeliest ones in its place; needs logprobs
    tools                  functions that the model may ask to be called
    tool_choice            auto, none, required, or the one function to be called
    parallel_tool_calls    false: at most one call
    separate_reasoning     false: what the model thinks stays in the content
    chat_template_kwargs   variables for the chat template
    """

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    temperature: Temperature | None = DEFAULT_TEMPERATURE
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = False
    top_logprobs: NumTopLogprobs | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    chat_template_kwargs: (
        Annotated[dict[str, str | int | float | bool | None], Meta(max_length=MAX_TEMPLATE_OPTIONS)]
        | None
    ) = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A call, and what its response should look like."""

    call: GenerationCall
    frame: Frame
    reading: Reading


def parse_chat(body: bytes, server: Server, template: Template | None) -> ChatRequest:
    """The request in the body of a POST; raises InvalidRequestError."""
    fields = parse_fields(body)
    refuse_unsupported(fields, (*NOT_YET, "functions"))
    chat = convert(fields, ChatBody)
    _check(chat)
    if template is None:
        raise InvalidRequestError(
            "this model has no chat template: use /v1/completions, or start the server with "
            "--chat-template"
        )
    head = frame(chat, server, "chatcmpl")
    use = tool_use(chat.tools or [], chat.tool_choice, chat.parallel_tool_calls)
    prompt, thinking = _prompt(chat, template, use, server.answers)
    answer = grammar_of(chat)
    grammar = server.answers.grammar(use, answer, thinking)
    reading = server.answers.reading(
        use,
        Thinking.OVER if chat.separate_reasoning is False else thinking,
        is_sure=grammar is not None,
    )
    prompt_call = PromptCall(
        prompt=prompt,
        sampling=_sampling(chat, template),
        logprobs=LogprobOptions(top_num=chat.top_logprobs or 0) if chat.logprobs else None,
        rid=head.id,
        is_length_explicit=_max_tokens(chat) is not None,
        grammar=grammar,
        kept_ids=reading.kept_ids,
    )
    call = GenerationCall(
        prompts=(prompt_call,),
        n=prompt_call.sampling.n,
        stream=bool(chat.stream),
        add_special_tokens=template.needs_special_tokens,
        namespace=namespace(chat),
    )
    return ChatRequest(call=call, frame=head, reading=reading)


def _check(body: ChatBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")


def _max_tokens(body: ChatBody) -> int | None:
    newer = body.max_completion_tokens
    return body.max_tokens if newer is None else newer


def _sampling(body: ChatBody, template: Template) -> SamplingParams:
    return sampling_params(
        body,
        max_new_tokens=_max_tokens(body),
        temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        stop=[*_stops(body.stop), *template.stop],
    )


def _stops(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


def _prompt(
    body: ChatBody, template: Template, use: ToolUse | None, answers: AnswerFormat
) -> tuple[str, Thinking]:
    """The prompt, and whether the model thinks next.

    An assistant's last message is the beginning of the answer to be continued.
    """
    messages = list(body.messages)
    prefill = ""
    if len(messages) > 1 and messages[-1].role == "assistant" and not messages[-1].tool_calls:
        prefill = template.begin_answer(template_messages(messages)[-1]["content"])
        messages.pop()
    tools = None if use is None else use.shown()
    rendered = _rendered(messages, template, tools, _template_options(body))
    thinking = Thinking.OVER
    if answers.reasoning is not None:
        thinking = thinking_in(prefill, thinking_after(rendered, answers.reasoning))
    return rendered + prefill, thinking


def _rendered(
    messages: Sequence[Message],
    template: Template,
    tools: list[dict[str, Any]] | None,
    options: Mapping[str, Any],
) -> str:
    try:
        return template.render(template_messages(messages), tools=tools, **options)
    except InvalidRequestError:
        if not any(message.tool_calls for message in messages):
            raise
        as_texts = template_messages(messages, has_objects=False)
        with suppress(InvalidRequestError):  # templates that join arguments to text
            return template.render(as_texts, tools=tools, **options)
        raise


def _template_options(body: ChatBody) -> Mapping[str, Any]:
    options = body.chat_template_kwargs or {}
    if len(options) > MAX_TEMPLATE_OPTIONS or not PROVIDED_NAMES.isdisjoint(options):
        raise InvalidRequestError(
            f"chat_template_kwargs may hold {MAX_TEMPLATE_OPTIONS} names, none of them "
            f"{', '.join(sorted(PROVIDED_NAMES))}",
            param="chat_template_kwargs",
        )
    return options
