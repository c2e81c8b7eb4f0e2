"""Which tokens the next forward pass computes: continuous batching with a token budget per step.

`plan` may be called while an earlier step still runs. It then works with what is certain: lengths
are known in advance, tokens are not. A request that turns out to have ended takes part in one step
too many; that token is dropped when its step is committed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from sgl.constrained.matcher import Matcher
from sgl.errors import PromptTooLongError
from sgl.messages import (
    Chunk,
    Embed,
    Finish,
    Generate,
    Int32Bytes,
    Logprobs,
    NewRow,
    RequestId,
    RowLogprobs,
    StepPlan,
    StepResult,
    TokenDelta,
    TokenMasks,
    pack,
    unpack,
)
from sgl.scheduling import jump_forward
from sgl.scheduling.admission import Admission
from sgl.scheduling.kv_store import KvStore
from sgl.scheduling.limits import Limits, PromptBudget
from sgl.scheduling.planned_step import Part, Step
from sgl.scheduling.policy import Policy, order
from sgl.scheduling.request import Request
from sgl.scheduling.rows import Rows, new_row

NO_TOKENS_WANTED = Finish("length", length=0)
NOT_A_NUMBER = Finish("abort", message="the model's output is not a number", status=500)


@dataclass(slots=True)
class Totals:
    """Counts since the start."""

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_retractions: int = 0
    num_jumped_tokens: int = 0  # taken without sampling them
    num_saved_passes: int = 0  # of a request: jumped tokens, less those sampled for nothing
    num_finished: int = 0
    num_aborted: int = 0


class Batcher:
    """Owns the queues. Messages go in through `add` and `end`, plans and deltas come out.

    is_held  requests that have not begun stay in the queue
    """

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
        self.policy = policy
        self.eos_ids = eos_ids
        self.jumps_forward = jumps_forward
        self.rng = random.Random(seed)
        self.admission = Admission(store, conservativeness)
        self.requests: dict[RequestId, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.in_flight: deque[Step] = deque()
        self.totals = Totals()
        self.is_held = False
        self._rows = Rows(limits.max_rows)
        self._num_arrived = 0
        self._num_constrained = 0  # of all requests

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
        self._num_constrained += matcher is not None
        if self.jumps_forward:
            self._count_jump(jump_forward.begin(request), num_dropped=0)
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def end(self, request_id: RequestId, finish: Finish) -> TokenDelta | None:
        """End a request in whatever state it is; None if there is no such request."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        self._end(request, finish)
        return request.last_delta(finish)

    def plan(self) -> StepPlan | None:
        """The next forward pass, or None when there is nothing that could run now."""
        if len(self.in_flight) >= self.limits.max_in_flight:
            return None
        self.admission.relax()
        decodes, growing, page_ids = self._plan_decodes()
        step = Step(self.totals.num_steps, decodes)
        admitted: list[NewRow] = []
        chunks = list(self._plan_chunks(step, admitted, num_decodes=len(decodes)))
        if not step.num_rows:
            # Prefills that were begun may hold all memory, so that none of them can go on.
            is_stuck = bool(self.running) and not self.in_flight
            return self.plan() if is_stuck and self._retract_one() else None
        self.totals.num_steps += 1
        self.in_flight.append(step)
        if self._num_constrained:
            step.find_masked()
        return StepPlan(
            step=step.number,
            released=self._rows.released(),
            admitted=admitted,
            decode_rows=self._rows.decoding(decodes),
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
        words_MW = np.full((len(masked), masked[0][2].num_words), -1, np.int32)
        for words_W, (_, request, matcher) in zip(words_MW, masked, strict=True):
            if step.wants(request):  # else the step is one too many, and anything will do
                matcher.write_mask(words_W)
        return TokenMasks(step.number, words_MW.tobytes())

    def commit(self, result: StepResult) -> list[TokenDelta]:
        """Take the oldest planned step's result in; returns what its requests gained."""
        step = self.in_flight.popleft()
        assert step.number == result.step, f"result {result.step} came for step {step.number}"
        deltas: list[TokenDelta] = []
        if result.error:
            rows = step.rows()
            failed = [rows[index] for index in unpack(result.failed)] or rows
            deltas = self._fail(failed, result.error)
            if not result.failed:
                return deltas
        logprobs = {row.index: row for row in result.logprobs}
        deltas += self._commit_decodes(step, result.token_ids, logprobs)
        deltas += self._commit_prompts(step, result, logprobs)
        return deltas

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
        self.store.check(self.requests.values())
        assert len(self.requests) == len(self.waiting) + len(self.running)
        self._rows.check(self.running)

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

    def _plan_chunks(self, step: Step, admitted: list[NewRow], num_decodes: int) -> Iterator[Chunk]:
        """Prefill in what is left beside the decodes: first what was begun, then new requests."""
        begun: list[Request] = []
        if num_decodes < len(self.running):
            begun = [request for request in self.running if request.is_prefilling]
        begun.sort(key=lambda request: not request.has_stale_row)  # streams that jump: a few tokens
        budget = self.limits.prompt_budget(num_decodes, len(self.waiting) + len(begun))
        for request in begun:
            if budget.is_spent:
                return
            row = new_row(request) if request.has_stale_row else None
            if chunk := self._chunk(step, request, budget):
                if row:
                    admitted.append(self._rows.renew(request, row))
                yield chunk
        for request in self._candidates(budget):
            admitted.append(self._admit(request))
            chunk = self._chunk(step, request, budget)
            assert chunk, "a request was admitted without memory for a single token"
            yield chunk
            if budget.is_spent:
                break

    def _candidates(self, budget: PromptBudget) -> Iterator[Request]:
        """Waiting requests that may start now, in order; each is attached to its cached prefix."""
        if budget.is_spent or not self.waiting or not self._rows.has_free():
            return
        window = order(self.waiting, self.policy, self.store.cache, self.rng)
        self.admission.begin(self.running)
        last_arrival = -1
        for request in window:
            if self.is_held and not request.num_retractions:
                continue
            if request.is_waiting_for_token or self.admission.waits_for_leader(request):
                continue
            if not self.admission.try_admit(request, is_alone=not self.running):
                break
            last_arrival = max(last_arrival, request.arrival)
            yield request
            if not self._rows.has_free():
                break
        for request in window:
            request.num_overtaken += request.row < 0 and request.arrival < last_arrival

    def _admit(self, request: Request) -> NewRow:
        self.waiting.remove(request)
        self.running.append(request)
        request.is_prefilling = True
        if request.num_cached < 0:
            request.num_cached = request.num_in_tree
            self.totals.num_cached_tokens += request.num_in_tree
        return self._rows.take(request)

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
        self.totals.num_prefill_tokens += end - start
        step.prompts.append(Part(request, end, has_output))
        has_next = end < request.prompt_len
        return Chunk(
            row=request.row,
            start=start,
            token_ids=request.token_ids[start:end].tobytes(),
            pages=pages.tobytes(),
            is_last=has_output,
            logprob_start=self._logprob_start(request, start, end),
            next_token_id=request.token_ids[end] if has_next else -1,
        )

    def _logprob_start(self, request: Request, start: int, end: int) -> int:
        """First position in [start, end) whose next token is a prompt token to report; or -1."""
        first = max(request.next_logprob - 1, start)
        return first if first < min(end, request.prompt_len - 1) else -1

    def _commit_decodes(
        self, step: Step, packed_ids: Int32Bytes, logprobs: dict[int, RowLogprobs]
    ) -> list[TokenDelta]:
        """Runs for every token of every request: most of them go the short way."""
        deltas: list[TokenDelta] = []
        skipped, emptied, num_plain = step.skipped, step.emptied, 0
        bytes_of_ids = [packed_ids[start : start + 4] for start in range(0, len(packed_ids), 4)]
        known = zip(step.decodes, unpack(packed_ids), bytes_of_ids, strict=False)  # prompts follow
        for index, (request, token_id, new_ids) in enumerate(known):
            if request.is_finished or (skipped and request in skipped):
                continue
            if not (emptied and request in emptied):
                request.num_computed += 1
            if logprobs or request.matcher is not None or token_id < 0:
                finish = self._accept(request, token_id)
                deltas += self._gained(request, finish, logprobs.get(index))
            else:
                ids = request.token_ids
                ids.append(token_id)
                is_last = len(ids) >= request.max_len or token_id in request.stop_ids
                finish = request.end_at(token_id) if is_last else None
                request.num_told += 1
                num_plain += 1
                deltas.append(TokenDelta(request.request_id, new_ids, finish, request.num_cached))
            if finish:
                self._end(request, finish)
        self.totals.num_output_tokens += num_plain
        return deltas

    def _commit_prompts(
        self, step: Step, result: StepResult, logprobs: dict[int, RowLogprobs]
    ) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        num_decodes = len(step.decodes)
        outputs: Iterator[int | bytes] = iter(
            result.vectors or unpack(result.token_ids)[num_decodes:]
        )
        for index, part in enumerate(step.prompts, num_decodes):
            request = part.request
            output = next(outputs) if part.has_output else None
            if not step.wants(request):
                continue
            if request not in step.emptied:
                request.num_computed = part.end
            finish, vector = self._take(part, output)
            found = self._with_unknown(part, logprobs.get(index))
            deltas += self._gained(request, finish, found, vector)
            if finish:
                self._end(request, finish)
            elif request not in step.emptied and not request.has_jumped:
                self.store.share(request)
        return deltas

    def _take(self, part: Part, output: int | bytes | None) -> tuple[Finish | None, bytes]:
        """Take in what the step made of a prompt; whether the request ends, and its vector."""
        request = part.request
        if output is None:
            is_end = request.max_new_tokens == 0 and part.end == request.prompt_len
            return NO_TOKENS_WANTED if is_end else None, b""
        if isinstance(output, bytes):
            return (NO_TOKENS_WANTED if output else NOT_A_NUMBER), output
        return self._accept(request, output), b""

    def _accept(self, request: Request, token_id: int) -> Finish | None:
        """Take a sampled token, and what its grammar forces after it."""
        if token_id < 0:
            return request.limit_met or NOT_A_NUMBER
        finish = request.accept(token_id)
        if finish or not self.jumps_forward:
            return finish
        num_dropped = int(request.is_waiting_for_token)
        jumped = jump_forward.jump(request)
        if jumped is None:
            return None
        for step in self.in_flight:
            step.skipped.add(request)
        self._count_jump(jumped.num_tokens, num_dropped)
        return jumped.finish

    def _with_unknown(self, part: Part, logprobs: RowLogprobs | None) -> RowLogprobs | None:
        """The log-probabilities of a part, with the prompt's first token, which has none."""
        request = part.request
        first = request.next_logprob
        if request.logprobs is None or first >= request.prompt_len:
            return logprobs
        request.next_logprob = min(part.end + 1, request.prompt_len)
        if first > 0:
            return logprobs
        known = logprobs or RowLogprobs(0)
        unknown_first = (known.input or Logprobs()).after_unknown(request.logprobs)
        return RowLogprobs(known.index, unknown_first, known.output)

    def _gained(
        self,
        request: Request,
        finish: Finish | None,
        logprobs: RowLogprobs | None,
        vector: bytes = b"",
    ) -> list[TokenDelta]:
        """What the client is to be told of a request now, if anything."""
        new_ids = request.tell()
        self.totals.num_output_tokens += len(new_ids) // 4
        found = logprobs or RowLogprobs(0)
        if not (finish or new_ids or found.input):
            return []
        num_cached = max(request.num_cached, 0)
        return [
            TokenDelta(
                request.request_id, new_ids, finish, num_cached, found.input, found.output, vector
            )
        ]

    def _count_jump(self, num_tokens: int, num_dropped: int) -> None:
        self.totals.num_jumped_tokens += num_tokens
        self.totals.num_saved_passes += num_tokens - num_dropped

    def _fail(self, requests: list[Request], error: str) -> list[TokenDelta]:
        """A step left nothing of these requests: they end, the others never notice."""
        finish = Finish("abort", message=error, status=500)
        ids = [request.request_id for request in requests if not request.is_finished]
        return [delta for request_id in ids if (delta := self.end(request_id, finish))]

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
        self.running.remove(victim)
        self._rows.give(victim)
        self.store.release(victim)
        for step in self.in_flight:
            step.emptied.add(victim)
        victim.num_retractions += 1
        self.waiting.insert(0, victim)
        self.totals.num_retractions += 1
        self.admission.tighten(self.running)
        return True

    def _end(self, request: Request, finish: Finish) -> None:
        request.is_finished = True
        is_aborted = finish.kind == "abort"
        self.totals.num_aborted += is_aborted
        self.totals.num_finished += not is_aborted
        self._num_constrained -= request.matcher is not None
        del self.requests[request.request_id]
        if request.row >= 0:
            self.running.remove(request)
            self._rows.give(request)
        else:
            self.waiting.remove(request)
        self.store.release(request)

    def _seed(self, seed: int | None) -> int:
        return self.rng.getrandbits(63) if seed is None else seed
