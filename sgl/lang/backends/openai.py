"""OpenAI's models, Azure's, and whatever else speaks their API."""

from __future__ import annotations

import asyncio
import json
import re
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from sgl.errors import BackendError
from sgl.lang.backends.api import MAX_RETRIES, ApiBackend, Fields, conversation, missing
from sgl.lang.chat_template import template_for, template_of
from sgl.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sgl.lang.ir import Sampling
from sgl.lang.prompt import Answer, Prompt

COMPLETION_MODELS = ("gpt-3.5-turbo-instruct", "davinci-002", "babbage-002")
REASONING_MODELS = re.compile(r"o\d|gpt-5")  # whose limit on tokens goes by another name
MAX_BIASED = 300  # tokens, by the API
FORCED = 100  # a bias that leaves a token no choice but to come


class Tokenizer(Protocol):
    """As tiktoken has it: `select` and integers need to know the model's tokens."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class OpenAIProtocol(ApiBackend):
    """Whatever takes and answers what OpenAI's API does. `model_name` is as it knows the model."""

    supported: tuple[str, ...] = (
        *("max_tokens", "stop", "temperature", "top_p", "frequency_penalty", "presence_penalty"),
        *("return_logprob", "top_logprobs_num", "dtype", "json_schema"),
    )

    def __init__(self, model_name: str, chat_template: str | None) -> None:
        super().__init__()
        self.model_name = model_name
        if chat_template is not None:
            self.chat_template = template_of(chat_template)
        else:
            self.chat_template = template_for(model_name) or self.chat_template

    @abstractmethod
    async def chat(self, **fields: Any) -> Any:
        """The reply to messages, or its events."""

    async def complete(self, **fields: Any) -> Any:
        """The reply to a text, or its events."""
        raise BackendError(f"{self.model_name} takes messages, not a text")

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        prompt, sampling = self._typed(prompt, sampling)
        ask, fields = await self._call(prompt, sampling)
        reply = await ask(**fields)
        self._count(_usage(reply))
        choice = reply.choices[0]
        text = choice.message.content if self.is_chat else choice.text
        mark = _mark(sampling)
        return Answer(f"{mark}{text or ''}{mark}", _meta_info(reply, choice))

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Answer]:
        prompt, sampling = self._typed(prompt, sampling)
        ask, fields = await self._call(prompt, sampling)
        meta_info: Fields = {}
        text = _mark(sampling)
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
        async for event in await ask(**fields):
            self._count(usage := _usage(event))
            for choice in event.choices[:1]:
                text += (choice.delta.content if self.is_chat else choice.text) or ""
                meta_info |= _meta_info(event, choice)
            if usage is not None:
                meta_info |= _counts(usage)
            yield Answer(text, meta_info)
        yield Answer(text + _mark(sampling), meta_info)

    def _typed(self, prompt: Prompt, sampling: Sampling) -> tuple[Prompt, Sampling]:
        """What a type asks of a model for completions, which may begin inside of the answer."""
        if sampling.dtype is None:
            return prompt, sampling
        if self.is_chat or sampling.dtype not in ("str", "int"):
            raise BackendError(
                f"{self.model_name} cannot generate dtype={sampling.dtype}: models for completions "
                "know str and int; ask a chat model for it with json_schema=..."
            )
        if sampling.dtype == "str":
            return replace(prompt, text=prompt.text + '"'), sampling.with_stops(['"'])
        return prompt, sampling.with_stops([" "])

    async def _call(self, prompt: Prompt, sampling: Sampling) -> tuple[Any, Fields]:
        """Chat or completion, and what it gets."""
        known = self.known(prompt, sampling)
        dtype, schema = known.pop("dtype", None), known.pop("json_schema", None)
        with_logprobs, num_top = known.pop("return_logprob", None), known.pop("top_logprobs_num", 0)
        fields: Fields = {"model": self.model_name, **known}
        if not self.is_chat:
            if prompt.images:
                raise BackendError(f"{self.model_name} is a model for text alone")
            if dtype == "int":
                fields["logit_bias"] = await self.digits()
            if with_logprobs:
                fields["logprobs"] = num_top
            return self.complete, fields | {"prompt": prompt.text}
        if schema is not None:
            form = {"name": "answer", "schema": json.loads(schema)}
            fields["response_format"] = {"type": "json_schema", "json_schema": form}
        if with_logprobs:
            fields |= {"logprobs": True, "top_logprobs": num_top}
        if REASONING_MODELS.match(self.model_name) and "max_tokens" in fields:
            fields["max_completion_tokens"] = fields.pop("max_tokens")
        return self.chat, fields | {"messages": conversation(prompt)}

    async def digits(self) -> Mapping[str, int]:
        """A bias to the tokens that whole numbers are made of."""
        raise BackendError(f"{self.model_name} has no tokenizer here, which integers need")

    def _count(self, usage: Any) -> None:
        if usage is not None:
            self.token_usage.add(usage.prompt_tokens, usage.completion_tokens)


class OpenAI(OpenAIProtocol):
    """A model behind OpenAI's API.

    model_name     as the API knows it
    is_chat_model  False for completions; if not said, the name tells
    chat_template  a name: how roles are written for a model for completions
    is_azure       the client is Azure's
    tokenizer      of the model, for select(...) and integers; tiktoken's if not given
    client_args    of the SDK's client: api_key, base_url, organization, timeout, max_retries, …

    Raises ImportError where the SDK is not installed.
    """

    def __init__(
        self,
        model_name: str,
        is_chat_model: bool | None = None,
        chat_template: str | None = None,
        is_azure: bool = False,
        tokenizer: Tokenizer | None = None,
        **client_args: Any,
    ) -> None:
        try:
            from openai import AsyncAzureOpenAI, AsyncOpenAI
        except ImportError:
            raise missing("openai", "openai", "OpenAI") from None
        super().__init__(model_name, chat_template)
        self.is_chat = model_name not in COMPLETION_MODELS
        if is_chat_model is not None:
            self.is_chat = is_chat_model
        if not self.is_chat:
            self.supported = tuple(name for name in self.supported if name != "json_schema")
        client = AsyncAzureOpenAI if is_azure else AsyncOpenAI
        given: Fields = {"max_retries": MAX_RETRIES} | client_args
        self._connect(partial(client, **given))
        self._tokenizer = tokenizer

    async def chat(self, **fields: Any) -> Any:
        return await self._client.chat.completions.create(**fields)

    async def complete(self, **fields: Any) -> Any:
        return await self._client.completions.create(**fields)

    async def select(
        self,
        prompt: Prompt,
        choices: Sequence[str],
        temperature: float,
        method: ChoicesSamplingMethod,
    ) -> ChoicesDecision:
        """Token by token: of those that some choice goes on with, the API names the likeliest.

        `method` is not asked: the API tells no log-probabilities of a prompt.
        """
        if self.is_chat:
            raise BackendError(
                f"{self.model_name} cannot select: a chat model does not go on from a choice. "
                "Use a model for completions, or gen(regex=...) on a runtime"
            )
        tokenizer = await self._loaded_tokenizer()
        left = {choice: tokenizer.encode(choice) for choice in choices}
        said: list[int] = []
        num_calls = 0
        while len(left) > 1:
            ended = [choice for choice, ids in left.items() if len(ids) == len(said)]
            if ended:
                left = {ended[0]: left[ended[0]]}
                break
            following = {ids[len(said)] for ids in left.values()}
            if len(following) == 1:
                (token,) = following
            else:
                token = await self._likeliest(prompt, said, sorted(following), temperature)
                num_calls += 1
            left = {choice: ids for choice, ids in left.items() if ids[len(said)] == token}
            said.append(token)
        (decision,) = left
        return ChoicesDecision(decision, {"num_calls": num_calls})

    async def _likeliest(
        self, prompt: Prompt, said: list[int], following: list[int], temperature: float
    ) -> int:
        """Which of some tokens the model goes on with."""
        tokenizer = await self._loaded_tokenizer()
        if len(following) > MAX_BIASED:
            raise BackendError(f"select among {len(following)} beginnings: at most {MAX_BIASED}")
        reply = await self._client.completions.create(
            model=self.model_name,
            prompt=prompt.text + tokenizer.decode(said),
            max_tokens=1,
            temperature=temperature,
            logit_bias={str(token): FORCED for token in following},
        )
        self._count(_usage(reply))
        text = reply.choices[0].text
        named = [token for token in following if tokenizer.decode([token]) == text]
        named += [token for token in following if tokenizer.decode([token]).strip() == text.strip()]
        if not named:
            raise BackendError(
                f"{self.model_name} went on with {text!r}, which no choice begins with: "
                "it does not follow logit_bias, or its tokenizer is another one"
            )
        return named[0]

    async def _loaded_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:  # tiktoken may fetch it
            self._tokenizer = await asyncio.to_thread(_tokenizer_of, self.model_name)
        return self._tokenizer

    async def digits(self) -> Mapping[str, int]:
        tokenizer = await self._loaded_tokenizer()
        allowed = [*map(str, range(1000)), " ", "-"]
        ids = [tokenizer.encode(text) for text in allowed]
        single = dict.fromkeys(one[0] for one in ids if len(one) == 1)
        return {str(token): FORCED for token in list(single)[:MAX_BIASED]}


def _mark(sampling: Sampling) -> str:
    """What a string is put in: it was asked for after the one and up to the other."""
    return '"' if sampling.dtype == "str" else ""


def _meta_info(reply: Any, choice: Any) -> Fields:
    meta_info: Fields = {"id": reply.id, "finish_reason": choice.finish_reason}
    if (logprobs := getattr(choice, "logprobs", None)) is not None:
        meta_info["logprobs"] = logprobs.model_dump()
    usage = _usage(reply)
    return meta_info | (_counts(usage) if usage is not None else {})


def _usage(reply: Any) -> Any:
    """LiteLLM leaves out what is not there."""
    return getattr(reply, "usage", None)


def _counts(usage: Any) -> Fields:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def _tokenizer_of(model_name: str) -> Tokenizer:
    try:
        import tiktoken
    except ImportError:
        raise ImportError(
            "select(...) and integers need the model's tokenizer: pip install tiktoken, or give "
            "OpenAI(..., tokenizer=...) one with encode and decode"
        ) from None
    try:
        tokenizer: Tokenizer = tiktoken.encoding_for_model(model_name)
    except KeyError:
        raise BackendError(
            f"tiktoken knows no tokenizer of {model_name}: give OpenAI(..., tokenizer=...) one"
        ) from None
    return tokenizer
