"""Our own runtime, in whatever way its `/generate` is reached."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias

from sgl.errors import BackendError
from sgl.lang.backends.base import Backend
from sgl.lang.chat_template import TEMPLATES, ChatTemplate, template_for
from sgl.lang.choices import ChoicesDecision, ChoicesSamplingMethod, mean
from sgl.lang.images import data_url
from sgl.lang.ir import Sampling
from sgl.lang.prompt import NOTHING_HELD, Answer, Held, Prompt

Fields: TypeAlias = "dict[str, Any]"

MAX_TEMPERATURE = 1e-5  # of a select
_NAMES = {  # of sampling parameters, where they are called otherwise
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}
_TO_SAMPLER = (
    "max_tokens",
    "min_tokens",
    "stop_token_ids",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "ignore_eos",
    "regex",
    "json_schema",
    "ebnf",
)
_TO_REQUEST = (
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_text_in_logprobs",
)


class NativeBackend(Backend):
    """
    keeps_tokens  a prompt may go on from the tokens of an earlier answer (`prefix_ids`)
    """

    keeps_tokens = False

    @abstractmethod
    async def ask(self, fields: Fields) -> Any:
        """The answer of `/generate`; raises what went wrong."""

    @abstractmethod
    def ask_streamed(self, fields: Fields) -> AsyncIterator[Fields]:
        """The events of it."""

    @abstractmethod
    async def tokenize(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        answer = await self.ask(self._fields(prompt, sampling))
        return self._answer(prompt, answer)

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Answer]:
        text = ""
        async for event in self.ask_streamed(self._fields(prompt, sampling) | {"stream": True}):
            is_whole = len(event["output_ids"]) == event["meta_info"]["completion_tokens"]
            text = event["text"] if is_whole else text + event["text"]  # with --stream-output
            yield self._answer(prompt, event | {"text": text})

    async def prefill(self, prompt: Prompt) -> None:
        """What follows may change the last tokens, so theirs are not kept."""
        await self.generate(prompt, Sampling(max_tokens=0))

    async def select(
        self,
        prompt: Prompt,
        choices: Sequence[str],
        temperature: float,
        method: ChoicesSamplingMethod,
    ) -> ChoicesDecision:
        """By the tokens that a choice adds to, or changes in, those of the prompt.

        One request for all. A choice that adds none is judged by the last token of the prompt.
        """
        if temperature > MAX_TEMPERATURE:
            raise BackendError(f"select takes the likeliest choice: temperature {temperature} is 0")
        if prompt.images:
            raise BackendError("select after an image is not supported")
        held, tail = self._parts(prompt)
        texts = [tail, *(tail + choice for choice in choices)]
        first, *others = await self.tokenize(texts, add_special_tokens=not held)
        prompts = [held + ids for ids in others]
        starts = [len(held) + _divergence(first, ids) for ids in others]
        if min(starts) < 1:
            raise BackendError(
                "select at the beginning of a text: the first token has no log-probability, so "
                "choices cannot be compared; say something before them"
            )
        if with_alone := method.requires_unconditional_logprobs:
            prompts += [ids[start:] for ids, start in zip(prompts, starts, strict=True)]
            starts += [0] * len(choices)
        answers = await self.ask(
            {
                "input_ids": prompts,
                "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                "return_logprob": True,
                "return_text_in_logprobs": True,
                "logprob_start_len": starts,
            }
        )
        rows = [answer["meta_info"]["input_token_logprobs"] for answer in answers]
        own, alone = rows[: len(choices)], rows[len(choices) :]
        return method(
            choices=choices,
            normalized_prompt_logprobs=[
                mean([row[0] for row in tokens if row[0] is not None]) for tokens in own
            ],
            input_token_logprobs=own,
            output_token_logprobs=[
                answer["meta_info"]["output_token_logprobs"] for answer in answers[: len(choices)]
            ],
            unconditional_token_logprobs=alone if with_alone else None,
        )

    def _parts(self, prompt: Prompt) -> tuple[list[int], str]:
        """The tokens that the prompt begins with, and the text after them."""
        held = prompt.held if self.keeps_tokens and not prompt.images else NOTHING_HELD
        return held.ids.tolist(), prompt.text[held.num_chars :]

    def _fields(self, prompt: Prompt, sampling: Sampling) -> Fields:
        sampling = sampling.with_dtype_as_regex().with_stops(prompt.stops)
        params = {
            _NAMES.get(name, name): value
            for name in _TO_SAMPLER
            if (value := getattr(sampling, name)) is not None
        }
        if sampling.stop:
            params["stop"] = list(sampling.stop)
        held, tail = self._parts(prompt)
        fields: Fields = {"text": tail, "sampling_params": params}
        for name in _TO_REQUEST:
            if (value := getattr(sampling, name)) is not None:
                fields[name] = value
        if self.keeps_tokens:
            fields["return_token_ids"] = True
        if held:
            fields["prefix_ids"] = held
        if prompt.images:
            fields["image_data"] = [data_url(image) for image in prompt.images]
        return fields

    def _answer(self, prompt: Prompt, answer: Fields) -> Answer:
        text, meta = answer["text"], answer["meta_info"]
        ids = meta.pop("prompt_token_ids", None)
        if ids is None:
            return Answer(text, meta)
        own, num_chars = meta.pop("text_token_ids"), meta.pop("text_token_chars")
        return Answer(text, meta, Held(array("i", ids + own), len(prompt.text) + num_chars))


def written_template(model_info: Fields) -> ChatTemplate:
    """As the model's own template writes roles; where it has no fixed way, as its name says."""
    written = model_info.get("chat_format")
    if written is None:
        return template_for(str(model_info["model_path"])) or TEMPLATES["default"]
    merges = written["merges_system"]
    return ChatTemplate(
        name="of the model",
        roles={role: (begin, end) for role, (begin, end) in written["roles"].items()},
        default_system_prompt=written["default_system_prompt"],
        stops=tuple(written["stops"]),
        opening=written["opening"],
        merges_system=merges and (merges[0], merges[1]),
    )


def _divergence(before: Sequence[int], after: Sequence[int]) -> int:
    """The first place where tokens differ; that of the last one where none do."""
    pairs = enumerate(zip(before, after, strict=False))
    place = next((index for index, (a, b) in pairs if a != b), min(len(before), len(after)))
    return min(place, len(after) - 1)
