"""A run in words: the table on the terminal and the JSON line in a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any

from sgl.bench.discovery import Target
from sgl.bench.load import Run
from sgl.bench.measures import Measures, Spread
from sgl.bench.settings import ServingConfig
from sgl.flags import field_options

NUM_ERRORS_SHOWN = 5
BUSY_CLIENT_SHARE = 0.8
LABELS = {
    "ttft": "TTFT  time to first token",
    "itl": "ITL   between two chunks",
    "tpot": "TPOT  per token after the first",
    "e2e": "E2E   whole request",
}
JSON_NAMES = {"ttft": "ttft", "itl": "itl", "tpot": "tpot", "e2e": "e2e_latency"}
_LABEL_WIDTH = 34
_COLUMN_WIDTH = 10


def table(config: ServingConfig, target: Target, rate: float, measures: Measures) -> str:
    """The result of a run, for people."""
    lines = [_title(config, target, rate), ""]
    lines += [f"{label:{_LABEL_WIDTH}}{text}" for label, text in _facts(config, measures)]
    if measures.completed:
        columns = [field.name for field in fields(Spread)]
        lines += ["", _row("milliseconds", columns)]
        lines += [_row(LABELS[metric], _cells(measures.spreads[metric])) for metric in LABELS]
    return "\n".join([*lines, *_remarks(measures)])


def comparison(rates: Sequence[float], all_measures: Sequence[Measures]) -> str:
    """One line for each request rate."""
    head = ["req/s", "out tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "failed"]
    lines = [_row("request rate", head)]
    for rate, measures in zip(rates, all_measures, strict=True):
        times: list[float | None] = []
        for metric in ("ttft", "itl"):
            found = measures.spreads[metric]
            times += [found.median, found.p99] if found else [None, None]
        served, output = measures.rate(measures.completed), measures.rate(measures.num_output)
        cells = [f"{served:,.2f}", f"{output:,.1f}", *map(_cell, times), str(measures.failed)]
        lines.append(_row(f"{rate:g}", cells))
    return "\n".join(lines)


def record(
    config: ServingConfig, target: Target, rate: float, measures: Measures
) -> dict[str, Any]:
    """The result of a run, for programs: settings, then measures under SGLang's names."""
    settings = asdict(config)
    for option in field_options(ServingConfig):
        if option.flag.is_secret:
            del settings[option.key]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **settings,
        "base_url": config.url,
        "model": target.model,
        "tokenizer": target.tokenizer_path,
        "request_rate": "inf" if math.isinf(rate) else rate,  # JSON has no infinity
        "completed": measures.completed,
        "failed": measures.failed,
        "duration": measures.duration_s,
        "total_input_tokens": measures.num_input,
        "total_output_tokens": measures.num_output,
        "total_cached_tokens": measures.num_cached,
        "request_throughput": measures.rate(measures.completed),
        "input_throughput": measures.rate(measures.num_input),
        "output_throughput": measures.rate(measures.num_output),
        "total_throughput": measures.rate(measures.num_input + measures.num_output),
        "concurrency": measures.mean_concurrency,
        "peak_concurrency": measures.peak_concurrency,
        "request_goodput": None if measures.num_good is None else measures.rate(measures.num_good),
        "client_cpu_share": measures.client_share,
        **_spread_fields(measures),
        "errors": dict(Counter(measures.errors).most_common(NUM_ERRORS_SHOWN)),
    }


def details(run: Run) -> list[dict[str, Any]]:
    """Each request in the order of their starts; times are seconds after the first start."""
    answers = sorted((each.answer for each in run.exchanges), key=lambda answer: answer.sent_s)
    begin = answers[0].sent_s
    return [
        {
            "sent": answer.sent_s - begin,
            "chunks": [chunk - begin for chunk in answer.chunk_times],
            "end": answer.end_s - begin,
            "input_tokens": answer.num_input,
            "output_tokens": answer.num_output,
            "cached_tokens": answer.num_cached,
            "error": answer.error,
        }
        for answer in answers
    ]


def _title(config: ServingConfig, target: Target, rate: float) -> str:
    load = "all at once" if math.isinf(rate) else f"{rate:g} requests/s"
    if config.max_concurrency is not None:
        load += f", at most {config.max_concurrency} at a time"
    return f"{config.dataset_name} to {config.backend} at {config.url} ({target.model}), {load}"


def _facts(config: ServingConfig, measures: Measures) -> Iterator[tuple[str, str]]:
    failed = f", {measures.failed:,} FAILED" if measures.failed else ""
    yield "requests", f"{measures.completed:,} done{failed}, in {measures.duration_s:,.2f} s"
    if not measures.completed:
        return
    yield "requests per second", f"{measures.rate(measures.completed):,.2f}"
    cached = ""
    if measures.num_cached is not None and measures.num_input:
        cached = f", {measures.num_cached / measures.num_input:.0%} of them from the cache"
    for name, count, more in (
        ("input", measures.num_input, cached),
        ("output", measures.num_output, ""),
    ):
        yield f"{name} tokens per second", f"{measures.rate(count):,.1f}  ({count:,} in all{more})"
    total = measures.rate(measures.num_input + measures.num_output)
    yield "all tokens per second", f"{total:,.1f}"
    yield (
        "requests at a time",
        f"{measures.mean_concurrency:,.1f} on average, {measures.peak_concurrency:,} at most",
    )
    if measures.num_good is not None:
        share = measures.num_good / max(1, measures.completed + measures.failed)
        goals = ", ".join(f"{metric} ≤ {limit:g} ms" for metric, limit in config.goals.items())
        good = f"{measures.rate(measures.num_good):,.2f}"
        yield "good requests per second", f"{good}  ({share:.0%} keep {goals})"


def _remarks(measures: Measures) -> Iterator[str]:
    if measures.failed:
        yield f"\n{measures.failed:,} requests failed:"
    shown = Counter(measures.errors).most_common(NUM_ERRORS_SHOWN)
    yield from (f"  {count:,} x {error}" for error, count in shown)
    if measures.client_share > BUSY_CLIENT_SHARE:
        yield (
            f"\nThis client used {measures.client_share:.0%} of a core: it may be slower than the "
            "server. Spread the load over several clients."
        )


def _cells(found: Spread | None) -> list[str]:
    values = [None] * len(fields(Spread)) if found is None else list(asdict(found).values())
    return [_cell(value) for value in values]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:{_LABEL_WIDTH}}" + "".join(f"{cell:>{_COLUMN_WIDTH}}" for cell in cells)


def _spread_fields(measures: Measures) -> Mapping[str, float | None]:
    named: dict[str, float | None] = {}
    for metric, name in JSON_NAMES.items():
        found = measures.spreads[metric]
        for field in fields(Spread):
            value = None if found is None else getattr(found, field.name)
            named[f"{field.name}_{name}_ms"] = value
    return named
