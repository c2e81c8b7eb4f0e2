"""How many prompt tokens a step may hold."""

from __future__ import annotations

import pytest

from sgl.scheduling.limits import Limits, PromptBudget

LIMITS = Limits(max_step_tokens=8192, min_prompt_tokens=192, max_rows=1024, max_total_len=10**6)


@pytest.mark.parametrize(
    ("num_decodes", "num_waiting", "wanted"),
    [
        (0, 1, PromptBudget(8192)),  # nobody is kept waiting
        (1, 1, PromptBudget(196, is_gentle=True)),
        (32, 2, PromptBudget(480, is_gentle=True)),
        (32, 20, PromptBudget(4800, is_gentle=True)),
        (32, 1000, PromptBudget(8160)),  # decodes count against the step
        (900, 1, PromptBudget(3792, is_gentle=True)),  # a step of many decodes is long anyway
        (8000, 1000, PromptBudget(2048)),  # prompts get a quarter
    ],
)
def test_prompts_get_more_of_a_step_the_more_requests_wait(num_decodes, num_waiting, wanted):
    assert LIMITS.prompt_budget(num_decodes, num_waiting) == wanted


def test_small_limits_still_let_prompts_through():
    limits = Limits(max_step_tokens=2, min_prompt_tokens=1, max_rows=8, max_total_len=100)
    assert limits.prompt_budget(num_decodes=8, num_waiting=50).fitting(0, 50) == 1


def test_a_budget_is_spent_prompt_by_prompt():
    budget = PromptBudget(100)
    assert budget.fitting(50_000, 30) == 30
    budget.take(50_000, 30)
    assert budget.fitting(0, 71) == 70
    budget.take(0, 70)
    assert budget.is_spent


def test_beside_streams_tokens_behind_a_long_context_count_for_more():
    budget = PromptBudget(300, is_gentle=True)
    assert budget.fitting(0, 1000) == 300
    assert budget.fitting(8192, 1000) == 150
    assert budget.fitting(2 * 8192, 1000) == 100
    assert budget.fitting(10**9, 1000) == 1
    budget.take(8192, 149)
    assert not budget.is_spent
    budget.take(8192, 1)
    assert budget.is_spent


def test_beside_streams_the_last_tokens_of_a_prompt_are_not_left_over():
    budget = PromptBudget(300, is_gentle=True)
    assert budget.fitting(0, 375) == 375
    assert budget.fitting(0, 376) == 300
    assert PromptBudget(300).fitting(0, 301) == 300  # a limit of memory is one
