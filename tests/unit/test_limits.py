"""How many prompt tokens a step may hold."""

from __future__ import annotations

import pytest

from sgl.scheduling.limits import Limits

LIMITS = Limits(max_step_tokens=8192, min_prompt_tokens=160, max_rows=1024, max_total_len=10**6)


@pytest.mark.parametrize(
    ("num_decodes", "num_waiting", "wanted"),
    [
        (0, 16_384, 8192),  # nobody is kept waiting
        (1, 500, 162),
        (32, 16_384, 256),  # a long prompt among streams: 64 steps
        (32, 1000, 224),
        (900, 1000, 1960),  # a step of many decodes is long anyway
        (32, 100_000, 1562),
        (32, 10**6, 8160),  # decodes count against the step
        (8000, 10**6, 2048),  # prompts get a quarter
    ],
)
def test_prompts_get_more_of_a_step_the_more_wait(num_decodes, num_waiting, wanted):
    assert LIMITS.prompt_tokens(num_decodes, num_waiting) == wanted


def test_small_limits_still_let_prompts_through():
    limits = Limits(max_step_tokens=2, min_prompt_tokens=1, max_rows=8, max_total_len=100)
    assert limits.prompt_tokens(num_decodes=8, num_waiting=50) == 1
