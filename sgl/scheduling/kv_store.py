"""Who owns which page of KV: the free list, the radix tree, or one request.

    free + evictable (tree) + pinned (tree) + private (requests) = all pages

Only KV of committed steps enters the tree, so a match never points at KV that a failed step did
not write. A page may be handed out again while a step in flight still writes to it: whatever reads
it next runs after that step, because the worker runs steps in order.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from sgl.scheduling.radix_cache import RadixCache
from sgl.scheduling.request import Request
from sgl.scheduling.slots import Slots


class KvStore:
    """Gives requests their pages, through the radix tree where it can."""

    def __init__(self, num_pages: int, page_size: int, *, is_cached: bool = True) -> None:
        self.page_size = page_size
        self.slots = Slots(num_pages, page_size)
        self.cache = RadixCache(page_size)
        self.is_cached = is_cached

    @property
    def num_pages(self) -> int:
        return self.slots.num_pages

    @property
    def num_available(self) -> int:
        """Pages that are free or can be made free at once."""
        return self.slots.num_free + self.cache.num_evictable

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def attach(self, request: Request) -> None:
        """Give a request without pages the longest cached prefix of its tokens, pinned."""
        limit = request.cache_limit if self.is_cached else 0
        match = self.cache.match(request.token_ids, request.namespace, limit)
        self.cache.pin(match.node)
        request.node, request.pages = match.node, match.pages[:]
        request.num_in_tree = request.num_computed = request.num_planned = match.num_tokens

    def grow(self, request: Request, num_tokens: int) -> array[int]:
        """Append the pages that `num_tokens` need, evicting as necessary; returns the new ones.

        The caller has seen that `num_available` suffices.
        """
        num_new = self.pages_for(num_tokens) - len(request.pages)
        if num_new <= 0:
            return array("i")
        pages = self._take(num_new)
        request.pages += pages
        return pages

    def add_page_each(self, requests: Sequence[Request]) -> array[int]:
        """Append a page to each of the requests; as `grow`, for many that decode."""
        pages = self._take(len(requests))
        for request, page in zip(requests, pages, strict=True):
            request.pages.append(page)
        return pages

    def share(self, request: Request) -> None:
        """Put the computed whole pages of a request that goes on into the tree.

        Where another request has put the same run there first, ours stays private until the end.
        """
        num_tokens = request.num_computed - request.num_computed % self.page_size
        if not self.is_cached or num_tokens <= request.num_in_tree or request.node is None:
            return
        run = request.token_ids[:num_tokens]
        if self.cache.match_len(run, request.namespace) > request.num_in_tree:
            return
        num_pages = num_tokens // self.page_size
        inserted = self.cache.insert(run, request.pages[:num_pages], request.namespace)
        self.cache.pin(inserted.node)
        self.cache.unpin(request.node)
        request.node, request.num_in_tree = inserted.node, num_tokens

    def release(self, request: Request) -> None:
        """Take all pages of a request back; what it computed stays cached."""
        if request.node is None:
            return
        num_kept = request.num_computed // self.page_size if self.is_cached else 0
        num_kept = max(num_kept, request.num_in_tree // self.page_size)
        own = request.pages
        kept = own[:num_kept]
        if num_kept * self.page_size > request.num_in_tree:
            run = request.token_ids[: num_kept * self.page_size]
            kept = self.cache.insert(run, kept, request.namespace).pages
        pairs = zip(own[:num_kept], kept, strict=True)
        duplicates = array("i", [mine for mine, theirs in pairs if mine != theirs])
        self.slots.give(duplicates + own[num_kept:])
        self.cache.unpin(request.node)
        self._forget(request)

    def flush(self) -> None:
        """Empty the tree; nobody may hold pages."""
        self.slots.give(self.cache.reset())

    def check(self, requests: Iterable[Request]) -> None:
        """Assert the identity at the top, from what every owner says it has."""
        self.slots.check()
        self.cache.check()
        private = sum(len(one.pages) - one.num_in_tree // self.page_size for one in requests)
        owned = self.slots.num_free + self.cache.num_evictable + self.cache.num_pinned + private
        assert owned == self.num_pages, f"{owned} pages are owned, there are {self.num_pages}"

    def _take(self, num_pages: int) -> array[int]:
        if (num_missing := num_pages - self.slots.num_free) > 0:
            self.slots.give(self.cache.evict(num_missing))
        return self.slots.take(num_pages)

    def _forget(self, request: Request) -> None:
        request.node, request.pages = None, array("i")
        request.num_in_tree = request.num_computed = request.num_planned = 0
