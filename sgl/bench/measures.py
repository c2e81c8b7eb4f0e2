"""What a run amounts to. One request, on the client's clock:

    sent          chunk 1        chunk 2  chunk 3              last chunk
      ├──── TTFT ────┤───── ITL ────┤── ITL ─┤─ … ─── ITL ────────┤
      ├─────────────────────────── E2E ───────────────────────────┤

    TPOT = (E2E - TTFT) / (tokens - 1)

A chunk that brings several tokens is one gap, not several: ITL is how the stream feels, TPOT how
fast the server is. Gaps of all requests are pooled; TPOT counts each request once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sgl.bench.load import Exchange, Run
from sgl.bench.prompts import Content, count_tokens
from sgl.bench.servers import Answer
from sgl.tokenizer import Tokenizer

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """How values in milliseconds are spread; percentiles are interpolated linearly."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer in milliseconds; None and empty where nothing was streamed.

    tpot is None for answers of fewer than two tokens, too.
    """

    e2e: float
    ttft: float | None
    tpot: float | None
    gaps: Sequence[float]

    def keeps(self, goals: Mapping[str, float]) -> bool:
        """Whether it is within every limit; for itl, its longest gap."""
        taken = {
            "e2e": self.e2e,
            "ttft": self.ttft,
            "tpot": self.tpot,
            "itl": max(self.gaps, default=None),
        }
        return all((taken[metric] or 0.0) <= limit for metric, limit in goals.items())


@dataclass(frozen=True, slots=True)
class Measures:
    """The numbers of a run; rates are per second from the first request to the last answer.

    num_cached        input tokens the server took from its cache; None if it does not tell
    mean_concurrency  requests under way, averaged over the time
    num_good          requests that kept all goals; None without goals
    """

    completed: int
    failed: int
    duration_s: float
    num_input: int
    num_output: int
    num_cached: int | None
    mean_concurrency: float
    peak_concurrency: int
    num_good: int | None
    timings: Sequence[Timing]
    spreads: Mapping[str, Spread | None]
    errors: Sequence[str]
    client_share: float

    def rate(self, count: float) -> float:
        return count / self.duration_s if self.duration_s else 0.0


def measure(run: Run, goals: Mapping[str, float], tokenizer: Tokenizer | None) -> Measures:
    """Sum a run up; `tokenizer` counts what the server did not."""
    answers = [exchange.answer for exchange in run.exchanges]
    done = [exchange for exchange in run.exchanges if not exchange.answer.error]
    num_outputs = [_num_output(exchange.answer, tokenizer) for exchange in done]
    timings = [
        timing(exchange.answer, num) for exchange, num in zip(done, num_outputs, strict=True)
    ]
    duration_s = max(each.end_s for each in answers) - min(each.sent_s for each in answers)
    cached = [each.answer.num_cached for each in done if each.answer.num_cached is not None]
    busy_s = sum(each.answer.end_s - each.answer.sent_s for each in done)
    return Measures(
        completed=len(done),
        failed=len(answers) - len(done),
        duration_s=duration_s,
        num_input=sum(_num_input(exchange, tokenizer) for exchange in done),
        num_output=sum(num_outputs),
        num_cached=sum(cached) if cached else None,
        mean_concurrency=busy_s / duration_s if duration_s else 0.0,
        peak_concurrency=peak_concurrency(answers),
        num_good=sum(each.keeps(goals) for each in timings) if goals else None,
        timings=timings,
        spreads={metric: spread(values) for metric, values in pooled(timings).items()},
        errors=[each.error for each in answers if each.error],
        client_share=run.client_share,
    )


def timing(answer: Answer, num_output: int) -> Timing:
    """The times of one answer that came; `num_output` is its length in tokens."""
    e2e = (answer.end_s - answer.sent_s) * 1e3
    if not answer.chunk_times:
        return Timing(e2e, None, None, ())
    ttft = (answer.chunk_times[0] - answer.sent_s) * 1e3
    tpot = (e2e - ttft) / (num_output - 1) if num_output > 1 else None
    gaps = [(after - before) * 1e3 for before, after in pairwise(answer.chunk_times)]
    return Timing(e2e, ttft, tpot, gaps)


def pooled(timings: Sequence[Timing]) -> dict[str, list[float]]:
    """Metric -> the values of all requests, in ms."""
    return {
        "ttft": [each.ttft for each in timings if each.ttft is not None],
        "itl": [gap for each in timings for gap in each.gaps],
        "tpot": [each.tpot for each in timings if each.tpot is not None],
        "e2e": [each.e2e for each in timings],
    }


def spread(values: Sequence[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    return Spread(float(np.mean(values)), *np.percentile(values, PERCENTILES).tolist())


def peak_concurrency(answers: Sequence[Answer]) -> int:
    """Most requests that were under way at the same time."""
    changes = [(each.sent_s, 1) for each in answers] + [(each.end_s, -1) for each in answers]
    current = peak = 0
    for _, change in sorted(changes):  # at the same moment an end comes before a start
        current += change
        peak = max(peak, current)
    return peak


def _num_output(answer: Answer, tokenizer: Tokenizer | None) -> int:
    """Told by the server, or counted, or one for each chunk."""
    if answer.num_output is not None:
        return answer.num_output
    if tokenizer is None and answer.chunk_times:
        return len(answer.chunk_times)
    return count_tokens(answer.text, tokenizer) if answer.text else 0


def _num_input(exchange: Exchange, tokenizer: Tokenizer | None) -> int:
    if exchange.answer.num_input is not None:
        return exchange.answer.num_input
    return content_tokens(exchange.content, tokenizer)


def content_tokens(content: Content, tokenizer: Tokenizer | None) -> int:
    """Tokens of a prompt as it was sent; of messages, without what their template adds."""
    if isinstance(content, str):
        return count_tokens(content, tokenizer)
    return sum(
        1 if isinstance(item, int) else count_tokens(item["content"], tokenizer) for item in content
    )
