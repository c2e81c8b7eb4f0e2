"""Texts to token ids, off the event loop where that would stall it."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Protocol

from sgl.actors.prompt_limits import PromptLimits
from sgl.errors import InvalidRequestError, PromptTooLongError
from sgl.protocol.call import GenerationCall, PromptCall, Vocabulary

MAX_INLINE_CHARS = 4096  # about 1 ms of work; handing it to a thread costs 0.1 ms
NUM_THREADS = 2
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8: all but the first of a character


class TextTokenizer(Vocabulary, Protocol):
    """What the front needs of a tokenizer."""

    @property
    def closing_id(self) -> int | None:
        """The token that ends a whole text, such as one to be embedded; None if there is none."""

    def encode(self, text: str, add_special_tokens: bool = True) -> array[int]: ...

    def encode_continuation(self, text: str) -> array[int]: ...

    def byte_table(self, skip_special_tokens: bool) -> Mapping[int, bytes]: ...


class PromptEncoder:
    """Token ids of every prompt of a call; `tokenizer` is None where only ids are served."""

    def __init__(self, tokenizer: TextTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")
        self._bytes = tokenizer.byte_table(False) if tokenizer else {}
        self._max_token_bytes = max(map(len, self._bytes.values()), default=1)

    async def encode(self, call: GenerationCall, limits: PromptLimits) -> list[array[int]]:
        num_chars = sum(self._check(prompt, limits) for prompt in call.prompts)
        if num_chars <= MAX_INLINE_CHARS:
            return self._encode_all(call, limits)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode_all, call, limits)

    @cached_property
    def added_id(self) -> int | None:
        """What the tokenizer puts before every text: the beginning-of-sequence token, if any."""
        added = self._tokenizer.encode("")[:1] if self._tokenizer else ()
        return added[0] if added else None

    def num_chars(self, ids: Iterable[int]) -> int:
        """Characters of the text that `ids` stand for; without a tokenizer each counts as one."""
        if self._tokenizer is None:
            return len(list(ids))
        data = b"".join(self._bytes.get(token_id, b"") for token_id in ids)
        return len(data.translate(None, CONTINUATION_BYTES))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check(self, prompt: PromptCall, limits: PromptLimits) -> int:
        """How many characters there are to encode; raises InvalidRequestError."""
        if self._tokenizer is None and (isinstance(prompt.prompt, str) or prompt.sampling.stop):
            raise InvalidRequestError(
                "this server runs without a tokenizer (--skip-tokenizer-init): give input_ids, "
                "and stop_token_ids instead of stop",
                param="text" if isinstance(prompt.prompt, str) else "stop",
            )
        if not isinstance(prompt.prompt, str):
            return 0
        num_chars = len(prompt.prompt)
        if num_chars > self._max_chars(limits) and not limits.allow_auto_truncate:
            least = num_chars // self._max_token_bytes
            raise PromptTooLongError(
                f"The input ({num_chars} characters, at least {least} tokens) is longer than the "
                f"model's context length ({limits.context_len} tokens)."
            )
        return min(num_chars, self._max_chars(limits))

    def _max_chars(self, limits: PromptLimits) -> int:
        """No token stands for more bytes than the longest one, and no character for none."""
        return limits.context_len * self._max_token_bytes

    def _encode_all(self, call: GenerationCall, limits: PromptLimits) -> list[array[int]]:
        return [self._encode(prompt, call, limits) for prompt in call.prompts]

    def _encode(self, prompt: PromptCall, call: GenerationCall, limits: PromptLimits) -> array[int]:
        if not isinstance(prompt.prompt, str):
            return prompt.prompt
        tokenizer = self._tokenizer
        assert tokenizer is not None, "texts were refused before"
        text = prompt.prompt[: self._max_chars(limits)]
        if prompt.prefix_ids is not None:
            return prompt.prefix_ids + tokenizer.encode_continuation(text)
        ids = tokenizer.encode(text, call.add_special_tokens)
        is_whole = call.wants_vectors and call.add_special_tokens
        if is_whole and (closing_id := tokenizer.closing_id) is not None:
            return _closed(ids, closing_id, limits)
        return ids


def _closed(ids: array[int], closing_id: int, limits: PromptLimits) -> array[int]:
    """The ids of a text with the closing token at their end, even where they are cut."""
    if ids[-1:].tolist() == [closing_id]:
        ids.pop()
    if limits.allow_auto_truncate:
        ids = ids[: limits.max_prompt_len - 1]
    ids.append(closing_id)
    return ids
