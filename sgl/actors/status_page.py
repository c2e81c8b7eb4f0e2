"""Numbers that every process may look at at any time, without asking anybody: one page of memory.

    [ u64 progress of actor 0 | of actor 1 | … | float64 gauges of the scheduler … ]

Each number is eight aligned bytes with one writer, so a reader sees an old or a new value, never a
mixture. The memory is a memfd that the actors inherit: it has no name and cannot be left behind.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import msgspec


class SchedulerStatus(msgspec.Struct, frozen=True):
    """The scheduler's numbers at one moment. All are floats on the page."""

    num_running_reqs: float = 0
    num_queue_reqs: float = 0
    num_used_tokens: float = 0
    max_total_tokens: float = 0
    token_usage: float = 0
    gen_throughput: float = 0
    cache_hit_rate: float = 0
    num_retractions: float = 0
    num_steps: float = 0
    num_in_flight: float = 0
    num_prefill_tokens: float = 0
    num_cached_tokens: float = 0
    num_output_tokens: float = 0
    num_jumped_tokens: float = 0
    num_saved_passes: float = 0
    is_loading: float = 0  # 1 while the workers replace their weights: no step is made then


_GAUGES = SchedulerStatus.__struct_fields__


class StatusPage:
    """One page; `fd` is inherited by the actors, which open it with the same names."""

    def __init__(self, fd: int, actor_names: Sequence[str]) -> None:
        self.fd = fd
        self._index = {name: index for index, name in enumerate(actor_names)}
        self._map = mmap.mmap(fd, _page_len(actor_names))
        split = 8 * len(actor_names)
        with memoryview(self._map) as memory, memory[:split] as head, memory[split:] as tail:
            self._progress = head.cast("Q")
            self._gauges = tail.cast("d")

    @classmethod
    def create(cls, actor_names: Sequence[str]) -> StatusPage:
        fd = os.memfd_create("sgl-status", os.MFD_CLOEXEC)
        os.ftruncate(fd, _page_len(actor_names))
        return cls(fd, actor_names)

    def close(self) -> None:
        """Give the descriptor and the memory back; the map has a descriptor of its own."""
        self._progress.release()
        self._gauges.release()
        self._map.close()
        os.close(self.fd)

    def beat(self, actor_name: str) -> None:
        """The actor went once around its loop."""
        self._progress[self._index[actor_name]] += 1

    def progress(self, actor_name: str) -> int:
        return self._progress[self._index[actor_name]]

    def write(self, status: SchedulerStatus) -> None:
        for index, name in enumerate(_GAUGES):
            self._gauges[index] = getattr(status, name)

    def read(self) -> SchedulerStatus:
        return SchedulerStatus(*self._gauges)


def _page_len(actor_names: Sequence[str]) -> int:
    return 8 * (len(actor_names) + len(_GAUGES))
