"""The free pages of the KV cache: who takes one owns it until it is given back."""

from __future__ import annotations

from array import array

import numpy as np


class Slots:
    """Hands out pages 0 … num_pages - 1, each holding the KV of `page_size` tokens.

    The free pages are a stack. A run that was given back comes out again in its old order, so
    neighbours in a sequence tend to stay neighbours in memory.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages >= 0, f"there cannot be {num_pages} pages"
        assert page_size > 0, f"a page cannot hold {page_size} tokens"
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = array("i", range(num_pages - 1, -1, -1))  # the next page to go out is last

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_pages: int) -> array[int]:
        """Pages that now belong to the caller, who has made sure that so many are free."""
        start = len(self._free) - num_pages
        assert 0 <= start <= len(self._free), f"took {num_pages} pages of {len(self._free)} free"
        pages = self._free[start:]
        del self._free[start:]
        pages.reverse()
        return pages

    def give(self, pages: array[int]) -> None:
        """Take back pages that the caller owned and no longer uses."""
        self._free.extend(pages[::-1])
        assert len(self._free) <= self.num_pages, (
            f"{len(self._free)} of {self.num_pages} pages are free: some were given back twice"
        )

    def check(self) -> None:
        """Raise AssertionError if a page is free twice or does not exist. O(num_pages)."""
        free = np.array(self._free, dtype=np.int64)
        strangers = free[(free < 0) | (free >= self.num_pages)]
        assert not strangers.size, f"pages {strangers[:8]} are free but do not exist"
        times_free = np.bincount(free, minlength=self.num_pages)
        doubles = np.flatnonzero(times_free > 1)
        assert not doubles.size, f"pages {doubles[:8]} were given back twice"
