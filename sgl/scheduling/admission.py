"""May a waiting request start now? Memory for its likely future, and prefixes about to be cached.

How much a running request will still need is not known: the estimate is `ratio` times what it may
generate. The ratio falls slowly while all goes well and jumps up when a request had to be
retracted, which holds new admissions back until memory has recovered.
"""

from __future__ import annotations

from collections.abc import Iterable

from sgl.scheduling.kv_store import KvStore
from sgl.scheduling.request import Request

START_RATIO = 0.7
MIN_RATIO = 0.1
RELAX_STEPS = 600  # steps from START_RATIO down to MIN_RATIO
ESTIMATE_CAP = 4096  # an answer is expected to be at most so long
SHARED_TOKENS = 32  # a prefix worth waiting one round for


class Admission:
    """Decides for one plan at a time: `begin`, then `try_admit` for one request after the other."""

    def __init__(self, store: KvStore, conservativeness: float) -> None:
        self.store = store
        self.ratio = min(1.0, START_RATIO * conservativeness)
        self.min_ratio = min(1.0, MIN_RATIO * conservativeness)
        self._relax_by = (self.ratio - self.min_ratio) / RELAX_STEPS
        self._promised_pages = 0
        self._leaders: dict[bytes, Request] = {}
        self._shared_len = max(SHARED_TOKENS, store.page_size)

    def relax(self) -> None:
        """A step went by."""
        self.ratio = max(self.min_ratio, self.ratio - self._relax_by)

    def tighten(self, running: Iterable[Request]) -> None:
        """A request was retracted: expect what the running ones show, and a margin."""
        done = wanted = 0
        for request in running:
            done += request.num_sampled + 20
            wanted += request.max_new_tokens + 1
        self.ratio = min(1.0, max(self.ratio, done / wanted if wanted else 0.0))

    def begin(self, running: Iterable[Request]) -> None:
        """Look at what runs: pages promised to it, and prefixes it is computing."""
        self._promised_pages = 0
        self._leaders.clear()
        for request in running:
            self._promised_pages += self._future_pages(request)
            if request.num_computed < request.prompt_len:
                self._lead(request)

    def waits_for_leader(self, request: Request) -> bool:
        """Whether a running request computes a prefix that this one can soon have for free."""
        if not self.store.is_cached:
            return False
        start = self.store.cache.match_len(
            request.token_ids, request.namespace, request.cache_limit
        )
        end = start + self._shared_len
        if end > request.cache_limit:
            return False
        leader = self._leaders.get(self._key(request, start))
        return leader is not None and leader.token_ids[:end] == request.token_ids[:end]

    def try_admit(self, request: Request, *, is_alone: bool) -> bool:
        """Attach the request to its cached prefix if it fits; a request alone always does."""
        self.store.attach(request)
        num_pages = self._future_pages(request)
        if not is_alone and self._promised_pages + num_pages > self.store.num_available:
            self.store.release(request)
            return False
        self._promised_pages += num_pages
        self._lead(request)
        return True

    def _future_pages(self, request: Request) -> int:
        """Pages the request is expected to take from now to its end."""
        num_new = request.max_new_tokens - request.num_sampled
        if not request.is_reserved:
            num_new = int(min(num_new, ESTIMATE_CAP) * self.ratio)
        length = max(len(request.token_ids), request.num_planned) + num_new
        return max(0, self.store.pages_for(length) - len(request.pages))

    def _lead(self, request: Request) -> None:
        self._leaders.setdefault(self._key(request, request.num_in_tree), request)

    def _key(self, request: Request, start: int) -> bytes:
        run = request.token_ids[start : start + self._shared_len]
        return request.namespace.encode() + b"\0" + run.tobytes()
