"""Whether a prompt can be served at all, and how long its answer may get."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from sgl.errors import InvalidRequestError, PromptTooLongError
from sgl.messages import LogprobOptions, unpack
from sgl.protocol.call import PromptCall
from sgl.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    """Checks token ids and lengths before anything is sent to the engine.

    context_len          tokens of prompt and answer together that the model can attend to
    max_request_tokens   the same, but as many as the KV cache can hold
    vocab_size           ids are below it
    allow_auto_truncate  keep the beginning of a prompt that is too long
    min_answer_len       tokens that must remain for the answer
    """

    context_len: int
    max_request_tokens: int
    vocab_size: int
    allow_auto_truncate: bool = False
    min_answer_len: int = 1

    @property
    def max_prompt_len(self) -> int:
        return min(self.context_len, self.max_request_tokens) - self.min_answer_len

    def cut(self, prompt_ids: array[int]) -> array[int]:
        """The prompt, shortened where that is allowed; raises InvalidRequestError."""
        if not prompt_ids:
            raise InvalidRequestError("the prompt is empty: it has no tokens", param="text")
        self._check_ids("the prompt", (min(prompt_ids), max(prompt_ids)))
        num_tokens = len(prompt_ids)
        if num_tokens <= self.max_prompt_len:
            return prompt_ids
        if self.allow_auto_truncate:
            return prompt_ids[: self.max_prompt_len]
        if num_tokens > self.context_len - self.min_answer_len:
            raise PromptTooLongError(
                f"The input ({num_tokens} tokens) is longer than the model's context length "
                f"({self.context_len} tokens)."
            )
        raise PromptTooLongError(
            f"Input length ({num_tokens} tokens) exceeds the maximum allowed length "
            f"({self.max_prompt_len} tokens): the KV cache holds no more."
        )

    def sampling(self, call: PromptCall, prompt_len: int) -> SamplingParams:
        """The parameters of one sample, its length clipped to what is left."""
        sampling = call.sampling
        self._check_sampling(sampling)
        max_new_tokens = sampling.max_new_tokens
        if call.is_length_explicit and max_new_tokens is not None:
            self._check_total(prompt_len, max_new_tokens)
        room = min(self.context_len, self.max_request_tokens) - prompt_len
        clipped = room if max_new_tokens is None else min(max_new_tokens, room)
        return msgspec.structs.replace(
            sampling,
            n=1,
            max_new_tokens=clipped,
            min_new_tokens=min(sampling.min_new_tokens, clipped),
            top_k=min(sampling.top_k, self.vocab_size),
        )

    def check_logprobs(self, options: LogprobOptions | None, prompt_len: int) -> None:
        if options is None:
            return
        if options.start_len >= prompt_len:
            raise InvalidRequestError(
                f"logprob_start_len is {options.start_len}, the prompt has {prompt_len} tokens",
                param="logprob_start_len",
            )
        self._check_ids("token_ids_logprob", unpack(options.token_ids))

    def _check_total(self, prompt_len: int, max_new_tokens: int) -> None:
        total = prompt_len + max_new_tokens
        if total > self.context_len and not self.allow_auto_truncate:
            raise PromptTooLongError(
                "Requested token count exceeds the model's maximum context length of "
                f"{self.context_len} tokens. You requested a total of {total} tokens: "
                f"{prompt_len} of the prompt and {max_new_tokens} of the answer.",
                param="max_new_tokens",
            )

    def _check_sampling(self, sampling: SamplingParams) -> None:
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        self._check_ids("logit_bias", sampling.logit_bias or ())

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    f"{name} holds the id {token_id}, the vocabulary has ids from 0 to "
                    f"{self.vocab_size - 1}",
                    param=name if " " not in name else "input_ids",
                )
