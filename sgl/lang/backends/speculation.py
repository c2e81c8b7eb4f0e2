"""One call of an API for several `gen`s: the model goes on past the end of the first one.

    "Name:" gen(stop="\\n") "\\nJob:" gen(stop="\\n")
             └ Ada ──────────▶ \\nJob: Countess.\\n …      what the one call answered
                               └ the program's own text, so its next gen is answered, too

Text that has been paid for is used as long as the program's own text agrees with it. A model for
completions is asked again from where it does not. A chat model cannot go on inside of a message, so
its answer must agree with all that the program says of the message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sgl.errors import BackendError
from sgl.lang.backends.base import Backend
from sgl.lang.ir import Gen, Sampling
from sgl.lang.prompt import Answer, Prompt

if TYPE_CHECKING:
    from sgl.lang.backends.api import ApiBackend

MAX_TRIES = 3  # of a chat model, until a message is as the program has it
MAX_KNOWN = 64  # answers, of as many copies of a program


@dataclass(slots=True)
class _Known:
    """A program's text, and what the model said would follow.

    images    of the program
    begin     characters of it that were the program's, when the model was asked
    num_used  characters that are, or have answered somebody: a copy that asks the same as another
              gets an answer of its own
    is_whole  the model had no more to say
    """

    text: str
    images: Sequence[bytes]
    meta_info: dict[str, Any]
    is_whole: bool
    begin: int
    num_used: int = 0

    def rest(self, prompt: Prompt, *, may_be_used: bool) -> str | None:
        """What follows on a prompt; None where that is not known, or is another's."""
        is_free = (
            len(prompt.text) > self.begin if may_be_used else self.num_used <= len(prompt.text)
        )
        is_known = self.text.startswith(prompt.text) and self.images == prompt.images
        return self.text[len(prompt.text) :] if is_free and is_known else None

    def use(self, prompt: Prompt, said: str) -> Answer:
        self.num_used = max(self.num_used, len(prompt.text) + max(len(said), 1))
        return Answer(said, self.meta_info)


class Speculation(Backend):
    """The calls of one run of a program, its copies included."""

    reads_ahead = True

    def __init__(self, api: ApiBackend, num_tokens: int) -> None:
        """`num_tokens` of each call at most."""
        self._api = api
        self._num_tokens = num_tokens
        self._known: deque[_Known] = deque(maxlen=MAX_KNOWN)
        self.chat_template = api.chat_template
        self.max_programs = api.max_programs

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        stops = (*(sampling.stop or ()), *prompt.stops)
        if (answer := self._told(prompt, stops, may_be_used=False)) is not None:
            return answer
        if self._api.is_chat:  # which would not begin another message with what it said in this
            if (answer := self._told(prompt, stops, may_be_used=True)) is not None:
                return answer
            return await self._message(prompt, sampling, stops)
        return await self._completion(prompt, sampling, stops)

    async def select(self, *arguments: Any) -> Any:
        return await self._api.select(*arguments)

    async def _completion(self, prompt: Prompt, sampling: Sampling, stops: Sequence[str]) -> Answer:
        if not stops and not isinstance(next(iter(prompt.ahead), None), str):
            return await self._api.generate(prompt, sampling)  # nothing tells where it ends
        longer = replace(sampling, stop=None, max_tokens=self._num_tokens)
        answer = await self._api.generate(replace(prompt, stops=()), longer)
        is_whole = answer.meta_info.get("finish_reason") == "stop"
        said = _until(answer.text, stops, prompt.ahead, may_end=is_whole)
        if said is None:
            return await self._api.generate(prompt, sampling)
        return self._keep(prompt, answer.text, answer, is_whole=is_whole).use(prompt, said)

    async def _message(self, prompt: Prompt, sampling: Sampling, stops: Sequence[str]) -> Answer:
        if prompt.begun is None:
            return await self._api.generate(prompt, sampling)  # which says what is wrong
        whole = replace(sampling, stop=None, max_tokens=self._num_tokens)
        before = prompt.text.removesuffix(prompt.begun)
        empty = replace(prompt, text=before, begun="", stops=())
        answer = Answer("")
        for _ in range(MAX_TRIES):
            answer = await self._api.generate(empty, whole)
            message = _begun_alike(answer.text, prompt.begun)
            if not message.startswith(prompt.begun):
                continue
            rest = message[len(prompt.begun) :]
            said = _until(rest, stops, prompt.ahead, may_end=True)
            if said is not None and _agrees(rest[len(said) :], prompt.ahead):
                return self._keep(prompt, rest, answer, is_whole=True).use(prompt, said)
        raise BackendError(
            f"{MAX_TRIES} answers did not have the form of the program's message, which begins "
            f"with {prompt.begun!r}; the last one: {answer.text!r:.300}. Show the model an example "
            "of it, or allow more num_api_spec_tokens"
        )

    def _told(self, prompt: Prompt, stops: Sequence[str], *, may_be_used: bool) -> Answer | None:
        """What an earlier call has told already, if it has."""
        for known in reversed(self._known):
            if (rest := known.rest(prompt, may_be_used=may_be_used)) is not None:
                said = _until(rest, stops, prompt.ahead, may_end=known.is_whole)
                if said is not None:
                    return known.use(prompt, said)
        return None

    def _keep(self, prompt: Prompt, rest: str, answer: Answer, *, is_whole: bool) -> _Known:
        text, begin = prompt.text + rest, len(prompt.text)
        self._known.append(_Known(text, prompt.images, answer.meta_info, is_whole, begin))
        return self._known[-1]


def _begun_alike(message: str, begun: str) -> str:
    """With as much space before it as the program has: APIs strip it."""
    space = begun[: len(begun) - len(begun.lstrip())]
    return space + message.lstrip()


def _until(
    text: str, stops: Sequence[str], ahead: Sequence[str | Gen], *, may_end: bool
) -> str | None:
    """What comes before a stop, or before the program's next text where it has no stops.

    may_end  what nothing ends is all there is; else None
    """
    ends = stops or [part for part in ahead[:1] if isinstance(part, str)]
    places = [place for end in ends if (place := text.find(end)) >= 0]
    if places:
        return text[: min(places)]
    return text if may_end else None


def _agrees(text: str, ahead: Sequence[str | Gen]) -> bool:
    """Whether what follows has the program's own texts in their places."""
    for index, part in enumerate(ahead):
        if isinstance(part, str):
            if not text.startswith(part):
                return index == len(ahead) - 1 and not part.strip() and not text.strip()
            text = text[len(part) :]
        else:
            said = _until(text, part.sampling.stop or (), ahead[index + 1 :], may_end=True)
            text = text[len(said or "") :]
    return True
