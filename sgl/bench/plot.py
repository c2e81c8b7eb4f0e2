"""Results as an SVG picture, drawn here so that nothing needs to be installed.

One run: the cumulative distributions of TTFT, ITL and E2E. Several request rates: median and 99th
percentile of TTFT and ITL over the rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count, takewhile

import numpy as np

from sgl.bench.measures import Measures, pooled

NAMES = {"ttft": "Time to first token", "itl": "Time between chunks", "e2e": "Whole request"}
COLORS = ("#2563eb", "#ea580c")
NUM_TICKS = 5
_WIDTH, _HEIGHT = 280, 180  # of the area inside the axes
_LEFT, _TOP, _RIGHT, _BOTTOM = 62, 46, 28, 48
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#374151}.title{font-size:13px;font-weight:600;"
    "fill:#111827}.grid{stroke:#e5e7eb}.axis{stroke:#9ca3af}"
    ".line{fill:none;stroke-width:2;stroke-linejoin:round}"
)

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram; `x_ticks` are values of x and what is written there."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[tuple[str, Sequence[Point]]]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]


def draw(rates: Sequence[float], all_measures: Sequence[Measures]) -> str:
    """The picture of one run, or of the runs at several rates."""
    if len(all_measures) == 1:
        panels = [_distribution(metric, all_measures[0]) for metric in NAMES]
    else:
        panels = [_over_rate(metric, rates, all_measures) for metric in ("ttft", "itl")]
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    drawn = [
        f'<g transform="translate({i * width},0)">{"".join(_panel(panel))}</g>'
        for i, panel in enumerate(panels)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(panels)}" '
            f'height="{height}" viewBox="0 0 {width * len(panels)} {height}">',
            f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
            *drawn,
            "</svg>\n",
        ]
    )


def _distribution(metric: str, measures: Measures) -> Panel:
    values = pooled(measures.timings)[metric]
    shares = np.linspace(0, 1, 201)
    places = np.quantile(values, shares).tolist() if values else []
    points = [(float(place), float(share)) for place, share in zip(places, shares, strict=False)]
    most = max(values, default=1.0)
    return Panel(
        NAMES[metric] if values else f"{NAMES[metric]} (not measured)",
        "milliseconds",
        "share of requests" if metric != "itl" else "share of gaps",
        [("", points)],
        ticks(most),
        [(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)],
    )


def _over_rate(metric: str, rates: Sequence[float], all_measures: Sequence[Measures]) -> Panel:
    """Rates stand at equal distances: they are usually powers of two, and one may be inf."""
    spreads = [(place, each.spreads[metric]) for place, each in enumerate(all_measures)]
    known = [(float(place), found) for place, found in spreads if found is not None]
    return Panel(
        NAMES[metric],
        "request rate (1/s)",
        "milliseconds",
        [
            ("median", [(place, found.median) for place, found in known]),
            ("p99", [(place, found.p99) for place, found in known]),
        ],
        [(float(place), f"{rate:g}") for place, rate in enumerate(rates)],
        ticks(max((found.p99 for _, found in known), default=1.0)),
    )


def ticks(most: float) -> list[tuple[float, str]]:
    """About five round numbers from 0 to just above `most`, and how they are written."""
    raw = max(most, 1e-9) / NUM_TICKS
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    places = [*takewhile(lambda place: place < most, (i * step for i in count()))]
    return [(place, f"{place:,.10g}") for place in (*places, len(places) * step)]


def _panel(panel: Panel) -> Iterator[str]:
    x_most = panel.x_ticks[-1][0] or 1.0
    y_most = panel.y_ticks[-1][0]

    def at(point: Point) -> Point:
        return _LEFT + point[0] / x_most * _WIDTH, _TOP + (1 - point[1] / y_most) * _HEIGHT

    left, bottom, right = _LEFT, _TOP + _HEIGHT, _LEFT + _WIDTH
    yield _text(left, 20, panel.title, "start", "title")
    yield _text(left + _WIDTH / 2, bottom + 36, panel.x_label)
    yield _text(left, _TOP - 8, panel.y_label, "start")
    for value, written in panel.y_ticks:
        y = at((0, value))[1]
        yield f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        yield _text(left - 6, y + 4, written, "end")
    for value, written in panel.x_ticks:
        yield _text(at((value, 0))[0], bottom + 16, written)
    yield f'<line class="axis" x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'
    for number, ((name, points), color) in enumerate(zip(panel.lines, COLORS, strict=False)):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
        yield f'<polyline class="line" stroke="{color}" points="{path}"/>'
        if name:
            x = right - 60 * (len(panel.lines) - number) + 20
            yield f'<rect x="{x}" y="{_TOP - 16}" width="10" height="10" rx="2" fill="{color}"/>'
            yield _text(x + 14, _TOP - 7, name, "start")


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    attributes = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes}>{escape(text)}</text>'
