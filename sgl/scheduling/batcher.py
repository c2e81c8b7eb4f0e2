"""Which tokens the next forward pass computes: continuous batching with a token budget per step.

`plan` may be called while an earlier step still runs. It then works with what is certain: lengths
are known in advance, tokens are not. A request that turns out to have ended takes part in one step
too many; that token is dropped when its step is committed.

    add ──▶ Queues ──▶ plan: the decodes, then PromptPlanner ──▶ a step in flight
              ▲                                                        │
              └── ends, jumps ── commit: ResultTaker ◀── its result ───┘
"""

from __future__ import annotations

import random
from collections.abc import Set as AbstractSet

import numpy as np

from sgl.constrained.matcher import Matcher
from sgl.errors import PromptTooLongError
from sgl.messages import (
    Embed,
    Finish,
    Generate,
    Int32Bytes,
    RequestId,
    StepPlan,
    StepResult,
    TokenDelta,
    TokenMasks,
    pack,
)
from sgl.scheduling import jump_forward
from sgl.scheduling.admission import Admission
from sgl.scheduling.kv_store import KvStore
from sgl.scheduling.limits import Limits
from sgl.scheduling.planned_step import Step
from sgl.scheduling.policy import Policy
from sgl.scheduling.prompts import PromptPlanner
from sgl.scheduling.queues import Queues
from sgl.scheduling.request import Request
from sgl.scheduling.results import ResultTaker

NUM_COMPARED = 16  # masks: answers in like places are often neighbours


class Batcher:
    """Messages go in through `add` and `end`, plans and what requests gained come out."""

    def __init__(
        self,
        store: KvStore,
        limits: Limits,
        *,
        policy: Policy = "lpm",
        conservativeness: float = 1.0,
        eos_ids: AbstractSet[int] = frozenset(),
        seed: int = 0,
        jumps_forward: bool = True,
    ) -> None:
        self.store = store
        self.limits = limits
        self.eos_ids = eos_ids
        self.jumps_forward = jumps_forward
        self.rng = random.Random(seed)
        self.queues = queues = Queues(store, limits.max_rows)
        self.requests, self.waiting, self.running = queues.requests, queues.waiting, queues.running
        self.in_flight, self.totals = queues.in_flight, queues.totals
        self._admission = Admission(store, conservativeness)
        self._prompts = PromptPlanner(queues, limits, self._admission, policy, self.rng)
        self._results = ResultTaker(queues, jumps_forward=jumps_forward)
        self._num_arrived = 0

    def add(self, message: Generate | Embed, matcher: Matcher | None = None) -> None:
        """Queue a request; raises PromptTooLongError where it could never run."""
        prompt_len = len(message.prompt_ids) // 4
        has_tokens = isinstance(message, Generate) and message.sampling.max_new_tokens != 0
        needed = prompt_len + has_tokens
        if needed > self.limits.max_total_len:
            raise PromptTooLongError(
                f"the prompt has {prompt_len} tokens, the server holds "
                f"{self.limits.max_total_len} per request with its answer: shorten the prompt"
            )
        request = self._request(message, matcher)
        self._num_arrived += 1
        if self.jumps_forward:
            self.queues.count_jump(jump_forward.begin(request), num_dropped=0)
        self.queues.add(request)

    def end(self, request_id: RequestId, finish: Finish) -> TokenDelta | None:
        """End a request in whatever state it is; None if there is no such request."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        self.queues.end(request, finish)
        return request.last_delta(finish)

    def plan(self) -> StepPlan | None:
        """The next forward pass, or None when there is nothing that could run now."""
        if len(self.in_flight) >= self.limits.max_in_flight:
            return None
        self._admission.relax()
        decodes, growing, page_ids = self._plan_decodes()
        step = Step(self.totals.num_steps, decodes)
        admitted, chunks = self._prompts.plan(step)
        if not step.num_rows:
            # Prefills that were begun may hold all memory, so that none of them can go on.
            is_stuck = bool(self.running) and not self.in_flight
            return self.plan() if is_stuck and self._retract_one() else None
        self.totals.num_steps += 1
        self.in_flight.append(step)
        if self.queues.num_constrained:
            step.find_masked()
        return StepPlan(
            step=step.number,
            released=self.queues.rows.released(),
            admitted=admitted,
            decode_rows=self.queues.rows.decoding(decodes),
            page_rows=b"" if len(growing) == len(decodes) else pack([one.row for one in growing]),
            page_ids=page_ids,
            chunks=chunks,
            masked=pack([index for index, _, _ in step.masked]),
        )

    def due_masks(self) -> TokenMasks | None:
        """Masks of the oldest step in flight, once: all tokens before it are known."""
        if not self.in_flight or not self.in_flight[0].masked:
            return None
        step = self.in_flight[0]
        masked, step.masked = step.masked, []
        words_W = np.full(masked[0][2].num_words, -1, np.int32)
        masks: list[bytes] = []
        which = []
        for _, request, matcher in masked:
            if step.wants(request):  # else the step is one too many, and anything will do
                matcher.write_mask(words_W)
            which.append(_place(masks, words_W.tobytes()))
        return TokenMasks(step.number, b"".join(masks), pack(which))

    def commit(self, result: StepResult) -> list[TokenDelta]:
        """Take the oldest planned step's result in; returns what its requests gained."""
        step = self.in_flight.popleft()
        assert step.number == result.step, f"result {result.step} came for step {step.number}"
        return self._results.take(step, result)

    @property
    def num_begun(self) -> int:
        """Requests that have run and have not ended; some may be back in the queue."""
        return len(self.running) + sum(request.num_retractions > 0 for request in self.waiting)

    @property
    def is_drained(self) -> bool:
        """Whether no request is in the middle and no step in flight."""
        return not self.in_flight and not self.num_begun

    def flush(self) -> bool:
        """Empty the cache; refused (False) while any request is waiting or running.

        A step in flight, one too many, may still write: whatever reads its pages runs after it.
        """
        if self.requests:
            return False
        self.store.flush()
        return True

    def check(self) -> None:
        """Assert that queues, rows and pages agree."""
        self.queues.check()

    def _request(self, message: Generate | Embed, matcher: Matcher | None) -> Request:
        if isinstance(message, Embed):
            return Request.for_vector(message, arrival=self._num_arrived)
        return Request.from_message(
            message,
            arrival=self._num_arrived,
            seed=self._seed(message.sampling.seed),
            eos_ids=self.eos_ids,
            max_total_len=self.limits.max_total_len,
            matcher=matcher,
        )

    def _plan_decodes(self) -> tuple[list[Request], list[Request], Int32Bytes]:
        """The requests that decode, those of them that get a page for it, and these pages."""
        size = self.store.page_size
        while True:
            decodes = [
                request
                for request in self.running
                if not request.is_prefilling and request.num_sampled < request.max_new_tokens
            ]
            # a token in the last page's first place: a page each where they hold one token
            needing = decodes if size == 1 else [r for r in decodes if r.num_planned % size == 0]
            if len(needing) <= self.store.num_available or not self._retract_one():
                break
        if left_out := set(needing[self.store.num_available :]):
            # a request that ends with the step in flight makes room for them
            decodes = [request for request in decodes if request not in left_out]
            needing = [request for request in needing if request not in left_out]
        pages = self.store.add_page_each(needing)
        for request in decodes:
            request.num_planned += 1
            request.num_sampled += 1
        return decodes, needing, pages.tobytes()

    def _retract_one(self) -> bool:
        """Send the running request with the least progress back to the queue.

        False if none should be: only one is left, or one ends with a step already in flight.
        """
        if len(self.running) < 2 or any(
            request.num_sampled >= request.max_new_tokens and not request.is_prefilling
            for request in self.running
        ):
            return False
        candidates = [request for request in self.running if not request.is_reserved]
        victim = min(
            candidates or self.running, key=lambda request: (request.num_output, -request.arrival)
        )
        self.queues.retract(victim)
        self._admission.tighten(self.running)
        return True

    def _seed(self, seed: int | None) -> int:
        return self.rng.getrandbits(63) if seed is None else seed


def _place(masks: list[bytes], mask: bytes) -> int:
    """Where a mask is among the last of these; it is put at the end if it is not there."""
    for place in range(len(masks) - 1, max(len(masks) - 1 - NUM_COMPARED, -1), -1):
        if masks[place] == mask:
            return place
    masks.append(mask)
    return len(masks) - 1
