"""What the language asks of whatever answers its programs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sgl.errors import BackendError
from sgl.lang.chat_template import TEMPLATES, ChatTemplate
from sgl.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sgl.lang.ir import Sampling
from sgl.lang.prompt import Answer, Prompt


class Backend(ABC):
    """The methods are awaited on the loop that all programs share, many at the same time.

    chat_template  how roles are written in the text of a program
    max_programs   of a batch that are at work at a time, unless `num_threads` says so
    reads_ahead    prompts tell it what the program says after the answer
    """

    chat_template: ChatTemplate = TEMPLATES["default"]
    max_programs: int = 1024
    reads_ahead: bool = False

    @abstractmethod
    async def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        """Go on from a prompt; raises what went wrong."""

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Answer]:
        """As `generate`, told while it grows: every answer has all the text so far."""
        yield await self.generate(prompt, sampling)

    async def select(
        self,
        prompt: Prompt,
        choices: Sequence[str],
        temperature: float,
        method: ChoicesSamplingMethod,
    ) -> ChoicesDecision:
        """The choice that is to follow on a prompt."""
        raise BackendError(f"{type(self).__name__} cannot select: it tells no log-probabilities")

    async def prefill(self, prompt: Prompt) -> None:  # noqa: B027  it may be left out
        """Compute what several continuations will share, where that is kept."""

    async def flush_cache(self) -> bool:
        """Forget cached prefixes; False where there are none to forget."""
        return False

    async def server_info(self) -> dict[str, Any] | None:
        """Settings and numbers of what answers; None where it tells none."""
        return None

    def speculating(self, num_tokens: int) -> Backend:
        """One that asks once for so many tokens and answers several `gen`s with them.

        A runtime that keeps what it computed gains nothing by that: it is the same.
        """
        return self
