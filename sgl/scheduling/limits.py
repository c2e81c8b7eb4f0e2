"""What a batcher may use, and how a step is divided between streams and prompts.

Streams pause while a step computes prompts. A step of decodes alone is bound by reading the
weights; some prompt tokens beside them cost next to nothing, many make it ten times as long. So
where streams run, prompts get a share of each step: the larger the more streams there are, as new
requests come more often then, and a multiple of it where several wait:

    32 streams, 1 waits ──▶ 288 tokens a step      32 streams, 20 wait ──▶ 4,320
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

TOKENS_PER_DECODE = 4  # prompt tokens for each stream beside them; its token takes as long as two
SHARES_PER_WAITING = 0.75  # of prompts, for each request that waits
CONTEXT_OF_A_TOKEN = 8192  # to attend to so many tokens takes as long as the rest of a token's work
MAX_OVERRUN = 1.25  # a prompt's last tokens are not left for another step


@dataclass(slots=True)
class PromptBudget:
    """Prompt tokens that a step may still hold.

    is_gentle  so few that streams hardly notice: a token counts for more behind a long context
    """

    left: float
    is_gentle: bool = False

    @property
    def is_spent(self) -> bool:
        return self.left < 1

    def fitting(self, start: int, rest: int) -> int:
        """How many of a prompt's tokens from `start` on, of which there are `rest`, it may hold."""
        num = max(round(self.left / self._cost(start)), 1)
        return rest if self.is_gentle and rest <= num * MAX_OVERRUN else min(rest, num)

    def take(self, start: int, num: int) -> None:
        self.left -= num * self._cost(start)

    def _cost(self, start: int) -> float:
        return 1 + start / CONTEXT_OF_A_TOKEN if self.is_gentle else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a batcher may use.

    max_step_tokens    prompt tokens a step may hold (decodes count against it, prompts get at
                       least a quarter)
    min_prompt_tokens  prompt tokens that a step may hold beside decodes, however few requests wait
    max_rows           requests that run at the same time
    max_total_len      prompt and answer of one request together
    max_in_flight      steps planned ahead of their results: 2 overlaps scheduling with the device
    """

    max_step_tokens: int
    max_rows: int
    max_total_len: int
    min_prompt_tokens: int = sys.maxsize
    max_in_flight: int = 2

    def prompt_budget(self, num_decodes: int, num_waiting: int) -> PromptBudget:
        """Of the next step.

        num_waiting  requests whose prompts are not computed yet
        """
        most = max(self.max_step_tokens - num_decodes, self.max_step_tokens // 4, 1)
        if not num_decodes:
            return PromptBudget(most)
        share = self.min_prompt_tokens + TOKENS_PER_DECODE * num_decodes
        gentle = share * max(num_waiting * SHARES_PER_WAITING, 1)
        return PromptBudget(most) if gentle >= most else PromptBudget(gentle, is_gentle=True)
