"""Rows of the workers' request table: who has which, and what the workers are told of that."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush

from sgl.messages import Int32Bytes, NewRow, pack
from sgl.scheduling.request import Request


class Rows:
    """What changes is told once, by the next plan."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._free = list(range(num_rows))
        self._released: list[int] = []
        self._last_decodes: list[int] = []

    def has_free(self) -> bool:
        return bool(self._free)

    def take(self, request: Request) -> NewRow:
        request.row = heappop(self._free)
        return new_row(request)

    def give(self, request: Request) -> None:
        heappush(self._free, request.row)
        self._released.append(request.row)
        request.row = -1
        request.is_prefilling = request.has_stale_row = False

    def renew(self, request: Request, row: NewRow) -> NewRow:
        """Have the workers give the row of a request that jumped up, and take it again."""
        self._released.append(row.row)
        request.has_stale_row = False
        return row

    def released(self) -> Int32Bytes:
        """Those that were given up since the last call."""
        released, self._released = self._released, []
        return pack(released)

    def decoding(self, decodes: Iterable[Request]) -> Int32Bytes | None:
        """The rows of the requests that decode; None where they are those of the last call."""
        rows = [request.row for request in decodes]
        if rows == self._last_decodes:
            return None
        self._last_decodes = rows
        return pack(rows)

    def check(self, running: Iterable[Request]) -> None:
        """Assert that each row is free, or a running request's."""
        rows = [request.row for request in running]
        assert sorted(rows + self._free) == list(range(self._num_rows))


def new_row(request: Request) -> NewRow:
    """What the workers must know of a request whose planned tokens have their KV."""
    sampling = request.sampling
    ids, prompt_len = request.token_ids, request.prompt_len
    return NewRow(
        row=request.row,
        num_cached=request.num_planned,
        pages=request.pages.tobytes(),
        sampling=sampling,
        seed=request.seed,
        num_output=request.num_output,
        eos_ids=pack(sorted(request.stop_ids)) if sampling.min_new_tokens else b"",
        prompt_ids=ids[:prompt_len].tobytes() if sampling.repetition_penalty != 1.0 else b"",
        output_ids=ids[prompt_len:].tobytes() if sampling.has_penalty else b"",
        logprobs=request.logprobs,
    )
