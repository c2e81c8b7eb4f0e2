"""What is sent: turns of conversations, as text or as token ids; and how to make some up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

from sgl.tokenizer import Tokenizer

Message: TypeAlias = dict[str, str]
Content: TypeAlias = str | list[int] | list[Message]
Schema: TypeAlias = dict[str, Any]
Format: TypeAlias = Callable[[Sequence[Message]], Content]

# Frequent enough to be one token each, with the blank before it, in every usual vocabulary.
_WORD_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education see know take come think "
    "look want give use find tell ask seem feel try leave call good new first last long great "
    "little own other old big high small large next early young important few public bad same able"
)
WORDS = _WORD_TEXT.split()


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user says, and how many tokens of answer are asked for.

    schema  the JSON schema an answer should follow, where the dataset has one
    """

    content: str | list[int]
    output_len: int
    schema: Schema | None = None


Conversation: TypeAlias = tuple[Turn, ...]


class Writer:
    """Makes up prompts; the same seed gives the same ones.

    With a tokenizer they have exactly the length asked for, not counting a beginning-of-sequence
    token that the server may put in front. Without one, ids are still exact and text has one word
    for each token.
    """

    def __init__(
        self, seed: int, tokenizer: Tokenizer | None, vocab_size: int, *, as_ids: bool
    ) -> None:
        self.random = Random(seed)
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._ids = _plain_ids(tokenizer, vocab_size)
        self._words = _one_token_words(tokenizer)

    def prompt(self, num_tokens: int) -> str | list[int]:
        return self.ids(num_tokens) if self._as_ids else self.text(num_tokens)

    def ids(self, num_tokens: int) -> list[int]:
        return self.random.choices(self._ids, k=num_tokens)

    def text(self, num_tokens: int) -> str:
        return " ".join(self.random.choices(self._words, k=num_tokens))

    def like(self, content: str | list[int]) -> str | list[int]:
        """A prompt of the same kind and length."""
        if isinstance(content, str):
            return self.text(self.num_tokens(content))
        return self.ids(len(content))

    def num_tokens(self, text: str) -> int:
        return count_tokens(text, self._tokenizer)


def joined(first: str | list[int], second: str | list[int]) -> str | list[int]:
    """One prompt of two, both text or both ids."""
    if isinstance(first, str):
        return f"{first} {second}"
    assert not isinstance(second, str), "one is text, the other token ids"
    return first + second


def count_tokens(text: str, tokenizer: Tokenizer | None) -> int:
    """Without a tokenizer four characters count as one."""
    return max(1, len(text) // 4) if tokenizer is None else len(tokenizer.encode(text))


def continuous(messages: Sequence[Message]) -> str:
    """A conversation without roles: each answer stands right behind what it continues."""
    texts: list[str] = []
    for message in messages:
        is_later_question = message["role"] == "user" and texts
        texts.append(("\n\n" if is_later_question else "") + message["content"])
    return "".join(texts)


def _plain_ids(tokenizer: Tokenizer | None, vocab_size: int) -> Sequence[int]:
    """Ids that may stand in a prompt: special tokens would end or structure it."""
    if tokenizer is None:  # where they are, if they are: at either end of the vocabulary
        return range(vocab_size // 10, vocab_size - vocab_size // 10)
    table = tokenizer.byte_table(skip_special_tokens=True)
    return sorted(key for key, data in table.items() if data and key < vocab_size)


def _one_token_words(tokenizer: Tokenizer | None) -> Sequence[str]:
    if tokenizer is None:
        return WORDS
    num_alone = len(tokenizer.encode("the"))
    fitting = [word for word in WORDS if len(tokenizer.encode(f"the {word}")) == num_alone + 1]
    return fitting or WORDS
