"""What `/metrics` tells: counts of the front, gauges of the scheduler's status page.

The names are those dashboards for SGLang know; no label has a value that a client chose.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

PREFIX = "sglang:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class SchedulerStatus(Protocol):
    """The scheduler's numbers at one moment; `num_steps` grows while it makes progress, unless the
    workers replace their weights (`is_loading`)."""

    @property
    def num_running_reqs(self) -> float: ...
    @property
    def num_queue_reqs(self) -> float: ...
    @property
    def num_used_tokens(self) -> float: ...
    @property
    def max_total_tokens(self) -> float: ...
    @property
    def token_usage(self) -> float: ...
    @property
    def gen_throughput(self) -> float: ...
    @property
    def cache_hit_rate(self) -> float: ...
    @property
    def num_retractions(self) -> float: ...
    @property
    def num_jumped_tokens(self) -> float: ...
    @property
    def num_saved_passes(self) -> float: ...
    @property
    def num_steps(self) -> float: ...
    @property
    def is_loading(self) -> float: ...


class StatusPage(Protocol):
    """Where the scheduler publishes; reading never waits for it."""

    def read(self) -> SchedulerStatus: ...


_GAUGES = (
    ("num_running_reqs", "Requests that are running."),
    ("num_queue_reqs", "Requests that wait."),
    ("num_used_tokens", "Tokens in the KV cache that running requests use."),
    ("max_total_num_tokens", "Tokens the KV cache holds."),
    ("token_usage", "Used share of the KV cache."),
    ("gen_throughput", "Tokens generated per second."),
    ("cache_hit_rate", "Share of prompt tokens found in the radix cache."),
)


class Histogram:
    """How often values fell between fixed bounds."""

    def __init__(self, bounds: tuple[float, ...] = _SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    @property
    def total(self) -> float:
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), cumulative."""
        names = [*map(str, self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))


class RequestCounts:
    """What the front counts. The two latencies of a stream are seen only where there is one."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_aborted = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self.time_to_first_token = Histogram()
        self.inter_token_latency = Histogram()
        self.end_to_end_latency = Histogram((*_SECONDS, 60.0, 120.0, 300.0, 600.0))


class Metrics(Collector):
    """Everything `/metrics` shows, gathered when asked."""

    def __init__(self, counts: RequestCounts, page: StatusPage, model_name: str) -> None:
        self._counts = counts
        self._page = page
        self._labels = {"model_name": model_name}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        status = self._page.read()
        values = (
            status.num_running_reqs,
            status.num_queue_reqs,
            status.num_used_tokens,
            status.max_total_tokens,
            status.token_usage,
            status.gen_throughput,
            status.cache_hit_rate,
        )
        for (name, text), value in zip(_GAUGES, values, strict=True):
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
        for name, text, count in (
            ("num_retractions", "Times a request lost its KV.", status.num_retractions),
            ("jump_forward_tokens", "Tokens that were forced.", status.num_jumped_tokens),
            ("jump_forward_passes_saved", "Passes not needed for them.", status.num_saved_passes),
        ):
            yield self._counter(name, text, count)

    def _counters(self) -> Iterator[Metric]:
        counts = self._counts
        yield self._counter("num_requests", "Requests taken.", counts.num_requests)
        yield self._counter("num_aborted_requests", "Requests aborted.", counts.num_aborted)
        yield self._counter("prompt_tokens", "Prompt tokens.", counts.num_prompt_tokens)
        yield self._counter("cached_tokens", "Cached prompt tokens.", counts.num_cached_tokens)
        yield self._counter("generation_tokens", "Tokens made.", counts.num_generated_tokens)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        counter = CounterMetricFamily(PREFIX + name, text, labels=list(self._labels))
        counter.add_metric(list(self._labels.values()), value)
        return counter

    def _histograms(self) -> Iterator[Metric]:
        counts = self._counts
        shown = (
            ("time_to_first_token_seconds", counts.time_to_first_token),
            ("inter_token_latency_seconds", counts.inter_token_latency),
            ("time_per_output_token_seconds", counts.inter_token_latency),
            ("e2e_request_latency_seconds", counts.end_to_end_latency),
        )
        for name, histogram in shown:
            family = HistogramMetricFamily(PREFIX + name, f"{name}.", labels=list(self._labels))
            family.add_metric(
                list(self._labels.values()), histogram.buckets(), sum_value=histogram.total
            )
            yield family
