"""All requests of the engine, by where they stand.

    add ──▶ waiting ── admit ──▶ running ── end ──▶ forgotten
               ▲                    │
               └───── retract ──────┘

A running request has a row of the workers' table and pages of KV. Steps that are in flight are told
when what they were planned with does not hold any more.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sgl.messages import Finish, NewRow, RequestId
from sgl.scheduling.kv_store import KvStore
from sgl.scheduling.planned_step import Step
from sgl.scheduling.request import Request
from sgl.scheduling.rows import Rows


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


class Queues:
    """Where requests stand, and what they own.

    is_held  requests that have not begun stay in the queue
    """

    def __init__(self, store: KvStore, max_rows: int) -> None:
        self.store = store
        self.rows = Rows(max_rows)
        self.requests: dict[RequestId, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.in_flight: deque[Step] = deque()
        self.totals = Totals()
        self.is_held = False
        self.num_constrained = 0  # of all requests

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self.num_constrained += request.matcher is not None

    def admit(self, request: Request) -> NewRow:
        """Let a request run that is attached to its cached prefix."""
        self.waiting.remove(request)
        self.running.append(request)
        request.is_prefilling = True
        if request.num_cached < 0:
            request.num_cached = request.num_in_tree
            self.totals.num_cached_tokens += request.num_in_tree
        return self.rows.take(request)

    def retract(self, request: Request) -> None:
        """Take row and pages from a running request; it is the next to run again."""
        self.running.remove(request)
        self.rows.give(request)
        self.store.release(request)
        for step in self.in_flight:
            step.emptied.add(request)
        request.num_retractions += 1
        self.waiting.insert(0, request)
        self.totals.num_retractions += 1

    def skip_in_flight(self, request: Request) -> None:
        """What steps in flight make of this request is not wanted."""
        for step in self.in_flight:
            step.skipped.add(request)

    def count_jump(self, num_tokens: int, num_dropped: int) -> None:
        self.totals.num_jumped_tokens += num_tokens
        self.totals.num_saved_passes += num_tokens - num_dropped

    def end(self, request: Request, finish: Finish) -> None:
        """Forget a request, in whatever state it is."""
        request.is_finished = True
        is_aborted = finish.kind == "abort"
        self.totals.num_aborted += is_aborted
        self.totals.num_finished += not is_aborted
        self.num_constrained -= request.matcher is not None
        del self.requests[request.request_id]
        if request.row >= 0:
            self.running.remove(request)
            self.rows.give(request)
        else:
            self.waiting.remove(request)
        self.store.release(request)

    def check(self) -> None:
        """Assert that queues, rows and pages agree."""
        self.store.check(self.requests.values())
        assert len(self.requests) == len(self.waiting) + len(self.running)
        self.rows.check(self.running)
        for request in self.running:  # a decode looks for its page no further than at the length
            if not request.is_prefilling:
                assert len(request.pages) == self.store.pages_for(request.num_planned)
