"""A backend for programs: it answers at once, or when it is let, and notes what it was asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from sgl.lang.backends.base import Backend
from sgl.lang.chat_template import template_of
from sgl.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sgl.lang.ir import Sampling
from sgl.lang.loop import loop_thread
from sgl.lang.prompt import Answer, Prompt

SOON_S = 2.0


class FakeBackend(Backend):
    """
    answer  what is said, from the text before it
    """

    chat_template = template_of("chatml")

    def __init__(self, answer: Callable[[str], str] | None = None) -> None:
        self._answer = answer or (lambda text: f"<{len(text)}>")
        self.prompts: list[Prompt] = []
        self.samplings: list[Sampling] = []
        self.prefilled: list[str] = []
        self.num_running = 0
        self.num_most = 0
        self.num_cancelled = 0
        self._may_answer: asyncio.Event | None = None

    def hold(self) -> None:
        """Answer nothing until `let`."""
        self._may_answer = asyncio.Event()

    def let(self) -> None:
        assert self._may_answer is not None
        loop_thread().loop.call_soon_threadsafe(self._may_answer.set)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        self.prompts.append(prompt)
        self.samplings.append(sampling)
        self.num_running += 1
        self.num_most = max(self.num_most, self.num_running)
        try:
            if self._may_answer is not None:
                await self._may_answer.wait()
            text = self._answer(prompt.text)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1
        return Answer(text, {"completion_tokens": len(text)})

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Answer]:
        answer = await self.generate(prompt, sampling)
        for end in range(1, len(answer.text) + 1):
            await asyncio.sleep(0.005)  # so that a reader sees each
            yield Answer(answer.text[:end], {"completion_tokens": end})

    async def select(
        self,
        prompt: Prompt,
        choices: Sequence[str],
        temperature: float,
        method: ChoicesSamplingMethod,
    ) -> ChoicesDecision:
        """The longest."""
        self.prompts.append(prompt)
        return ChoicesDecision(max(choices, key=len), {"temperature": temperature})

    async def prefill(self, prompt: Prompt) -> None:
        self.prefilled.append(prompt.text)


def wait_until(holds: Callable[[], object]) -> bool:
    """Whether it came to hold soon."""
    deadline = time.monotonic() + SOON_S
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
