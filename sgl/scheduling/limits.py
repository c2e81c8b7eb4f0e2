"""What a batcher may use, and how a step is divided between streams and prompts.

Streams pause while a step computes prompts. A step of decodes alone is bound by reading the
weights; some prompt tokens beside them cost next to nothing, many make it ten times as long. So
where streams run, a step takes few prompt tokens while few wait, and more the more there are:

    waiting   500 ──▶ 200 a step: streams hardly notice     50,000 ──▶ 800     500,000 ──▶ 8,000
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

TOKENS_PER_DECODE = 2  # a decode, which reads its whole KV, takes as long as so many prompt tokens
SPREAD_STEPS = 64  # the waiting prompts would be computed in so many steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a batcher may use.

    max_step_tokens    prompt tokens a step may hold (decodes count against it, prompts get at
                       least a quarter)
    min_prompt_tokens  prompt tokens that a step may hold beside decodes, however few wait
    max_rows           requests that run at the same time
    max_total_len      prompt and answer of one request together
    max_in_flight      steps planned ahead of their results: 2 overlaps scheduling with the device
    """

    max_step_tokens: int
    max_rows: int
    max_total_len: int
    min_prompt_tokens: int = sys.maxsize
    max_in_flight: int = 2

    def prompt_tokens(self, num_decodes: int, num_waiting: int) -> int:
        """How many prompt tokens the next step may hold.

        num_waiting  tokens of all prompts that are not computed yet
        """
        most = max(self.max_step_tokens - num_decodes, self.max_step_tokens // 4, 1)
        if not num_decodes:
            return most
        gentle = self.min_prompt_tokens + TOKENS_PER_DECODE * num_decodes
        return min(most, max(gentle, num_waiting // SPREAD_STEPS))
