"""Which prompt tokens a step computes beside its decodes: first what was begun, then new ones."""

from __future__ import annotations

import random
from collections.abc import Iterator

from sgl.messages import Chunk, NewRow
from sgl.scheduling.admission import Admission
from sgl.scheduling.limits import Limits, PromptBudget
from sgl.scheduling.planned_step import Part, Step
from sgl.scheduling.policy import Policy, order
from sgl.scheduling.queues import Queues
from sgl.scheduling.request import Request
from sgl.scheduling.rows import new_row


class PromptPlanner:
    """Lets waiting requests run, and cuts prompts into chunks."""

    def __init__(
        self,
        queues: Queues,
        limits: Limits,
        admission: Admission,
        policy: Policy,
        rng: random.Random,
    ) -> None:
        self.queues = queues
        self.store = queues.store
        self.limits = limits
        self.admission = admission
        self.policy = policy
        self.rng = rng

    def plan(self, step: Step) -> tuple[list[NewRow], list[Chunk]]:
        """Add prompts to a step that holds its decodes: the rows they take, and the chunks."""
        admitted: list[NewRow] = []
        return admitted, list(self._chunks(step, admitted))

    def _chunks(self, step: Step, admitted: list[NewRow]) -> Iterator[Chunk]:
        running, num_decodes = self.queues.running, len(step.decodes)
        begun: list[Request] = []
        if num_decodes < len(running):
            begun = [request for request in running if request.is_prefilling]
        begun.sort(key=lambda request: not request.has_stale_row)  # streams that jump: a few tokens
        budget = self.limits.prompt_budget(num_decodes, len(self.queues.waiting) + len(begun))
        for request in begun:
            if budget.is_spent:
                return
            row = new_row(request) if request.has_stale_row else None
            if chunk := self._chunk(step, request, budget):
                if row:
                    admitted.append(self.queues.rows.renew(request, row))
                yield chunk
        for request in self._candidates(budget):
            admitted.append(self.queues.admit(request))
            chunk = self._chunk(step, request, budget)
            assert chunk, "a request was admitted without memory for a single token"
            yield chunk
            if budget.is_spent:
                break

    def _candidates(self, budget: PromptBudget) -> Iterator[Request]:
        """Waiting requests that may start now, in order; each is attached to its cached prefix."""
        queues = self.queues
        if budget.is_spent or not queues.waiting or not queues.rows.has_free():
            return
        window = order(queues.waiting, self.policy, self.store.cache, self.rng)
        self.admission.begin(queues.running)
        last_arrival = -1
        for request in window:
            if queues.is_held and not request.num_retractions:
                continue
            if request.is_waiting_for_token or self.admission.waits_for_leader(request):
                continue
            if not self.admission.try_admit(request, is_alone=not queues.running):
                break
            last_arrival = max(last_arrival, request.arrival)
            yield request
            if not queues.rows.has_free():
                break
        for request in window:
            request.num_overtaken += request.row < 0 and request.arrival < last_arrival

    def _chunk(self, step: Step, request: Request, budget: PromptBudget) -> Chunk | None:
        """As much of a request's prefill as budget and memory allow; None if that is nothing."""
        start, target = request.num_planned, len(request.token_ids)
        held = len(request.pages) + self.store.num_available
        end = min(start + budget.fitting(start, target - start), held * self.store.page_size)
        if end <= start:
            return None
        budget.take(start, end - start)
        pages = self.store.grow(request, end)
        is_end = end == target
        has_output = is_end and request.wants_output
        request.num_planned = end
        request.num_sampled += has_output and not request.wants_vector
        request.is_prefilling = not is_end
        self.queues.totals.num_prefill_tokens += end - start
        step.prompts.append(Part(request, end, has_output))
        has_next = end < request.prompt_len
        return Chunk(
            row=request.row,
            start=start,
            token_ids=request.token_ids[start:end].tobytes(),
            pages=pages.tobytes(),
            is_last=has_output,
            logprob_start=_logprob_start(request, start, end),
            next_token_id=request.token_ids[end] if has_next else -1,
        )


def _logprob_start(request: Request, start: int, end: int) -> int:
    """First position in [start, end) whose next token is a prompt token to report; or -1."""
    first = max(request.next_logprob - 1, start)
    return first if first < min(end, request.prompt_len - 1) else -1
