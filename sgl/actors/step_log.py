"""What the scheduler tells about its steps: log lines, throughput, and a trace on request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import BinaryIO

import orjson

from sgl.errors import ConfigError
from sgl.messages import StepPlan
from sgl.scheduling.batcher import Batcher

logger = logging.getLogger(__name__)

THROUGHPUT_WINDOW_S = 1.0


class StepLog:
    """Told when a plan was sent and when its result arrived; `clock` gives seconds.

    The trace has one JSON line per step: its number, when its plan was sent, when its result
    arrived, and how many rows and prompt tokens it held.
    """

    def __init__(
        self, decode_interval: int, trace: BinaryIO | None, clock: Callable[[], float]
    ) -> None:
        self.throughput = 0.0
        self._decode_interval = decode_interval
        self._trace = trace
        self._clock = clock
        self._sent: dict[int, tuple[float, int, int]] = {}
        self._num_decodes = 0
        self._num_cached = 0
        self._window_start, self._window_tokens = clock(), 0

    def planned(self, plan: StepPlan, batcher: Batcher) -> None:
        """A plan is on its way to the workers."""
        num_rows = batcher.in_flight[-1].num_rows
        num_prefill = sum(len(chunk.token_ids) // 4 for chunk in plan.chunks)
        self._sent[plan.step] = (self._clock(), num_rows, num_prefill)
        if plan.chunks:
            self._log_prefill(plan, batcher, num_prefill)
        if num_rows > len(plan.chunks):
            self._num_decodes += 1
            if self._num_decodes % self._decode_interval == 0:
                self._log_decode(batcher)

    def arrived(self, step: int, num_output_tokens: int) -> None:
        """A step's result is here; `num_output_tokens` have been generated since the start."""
        now = self._clock()
        sent, num_rows, num_prefill = self._sent.pop(step)
        elapsed = now - self._window_start
        if elapsed >= THROUGHPUT_WINDOW_S:
            self.throughput = (num_output_tokens - self._window_tokens) / elapsed
            self._window_start, self._window_tokens = now, num_output_tokens
        if self._trace:
            line = {"step": step, "sent": sent, "arrived": now}
            line |= {"num_rows": num_rows, "num_prefill_tokens": num_prefill}
            self._trace.write(orjson.dumps(line) + b"\n")
            self._trace.flush()

    def _log_prefill(self, plan: StepPlan, batcher: Batcher, num_prefill: int) -> None:
        totals = batcher.totals
        num_cached = totals.num_cached_tokens - self._num_cached
        self._num_cached = totals.num_cached_tokens
        all_tokens = totals.num_cached_tokens + totals.num_prefill_tokens
        logger.info(
            "Prefill batch. #new-seq: %d, #new-token: %d, #cached-token: %d, "
            "cache hit rate: %.2f%%, token usage: %.2f, #running-req: %d, #queue-req: %d",
            len(plan.admitted),
            num_prefill,
            num_cached,
            100.0 * totals.num_cached_tokens / max(all_tokens, 1),
            _usage(batcher),
            len(batcher.running) - len(plan.admitted),
            len(batcher.waiting),
        )

    def _log_decode(self, batcher: Batcher) -> None:
        store = batcher.store
        logger.info(
            "Decode batch. #running-req: %d, #token: %d, token usage: %.2f, "
            "gen throughput (token/s): %.2f, #queue-req: %d",
            len(batcher.running),
            (store.num_pages - store.num_available) * store.page_size,
            _usage(batcher),
            self.throughput,
            len(batcher.waiting),
        )


def open_trace(path: str | None) -> BinaryIO | None:
    """The file of --trace-steps; raises ConfigError."""
    try:
        return open(path, "wb") if path else None
    except OSError as error:
        raise ConfigError(f"--trace-steps {path} cannot be written: {error.strerror}") from None


def _usage(batcher: Batcher) -> float:
    return 1.0 - batcher.store.num_available / batcher.store.num_pages
