"""Where a GPU waits: reads a profile of a worker and prints how busy the device was in its steps.

    python scripts/gpu_gaps.py /tmp/rank0-20260101-120000-000000.trace.json.gz

    host    [ step 7 ··· launch ········ ] [ step 8 ··· launch ········ ]     annotations
    device            [▓▓▓▓▓ ▓▓▓▓▓▓▓▓▓]                 [▓▓▓▓▓▓▓ ▓▓▓▓▓]
                            └ inside  └──── between ────┘

    step 7 lasts from its first work to the first of step 8

A launch belongs to the annotation it happens in; work on the device belongs to the launch with its
correlation id, which all kernels of a recorded graph share. Work of several streams at the same
time counts once. Times are in microseconds, as in the trace.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import statistics
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

LAUNCHES = {"cuda_runtime", "cuda_driver"}
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
GRAPH_LAUNCHES = {"cudaGraphLaunch", "cuGraphLaunch"}
STEP = re.compile(r"step (\d+)")
NAME_WIDTH = 60


class TraceError(Exception):
    """The file cannot be reported on; says why."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that lasted; `correlation` joins a launch and the work it started."""

    name: str
    start: float
    end: float
    correlation: int | None = None

    @property
    def time(self) -> float:
        return self.end - self.start


@dataclass(slots=True)
class Trace:
    """What is of interest in a profile, each in the order of its start."""

    steps: list[Span] = field(default_factory=list)
    launches: list[Span] = field(default_factory=list)
    operators: list[Span] = field(default_factory=list)
    work: list[Span] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[dict[str, Any]]) -> Trace:
        trace = cls()
        for event in events:
            if event.get("ph") == "X" and (kind := trace._kind_of(event)) is not None:
                start = float(event["ts"])
                correlation = event.get("args", {}).get("correlation")
                kind.append(Span(event["name"], start, start + float(event["dur"]), correlation))
        for kind in (trace.steps, trace.launches, trace.operators, trace.work):
            kind.sort(key=lambda span: span.start)
        return trace

    def _kind_of(self, event: dict[str, Any]) -> list[Span] | None:
        category = event.get("cat")
        if category in DEVICE_WORK:
            return self.work
        if category in LAUNCHES:
            return self.launches
        if category == "cpu_op":
            return self.operators
        is_step = category == "user_annotation" and STEP.fullmatch(event["name"])
        return self.steps if is_step else None


class BusyTime:
    """When the device did anything at all."""

    def __init__(self, work: Sequence[Span]) -> None:
        """`work` in the order of its start."""
        self.intervals: list[tuple[float, float]] = []
        for span in work:
            if self.intervals and span.start <= self.intervals[-1][1]:
                start, end = self.intervals[-1]
                self.intervals[-1] = start, max(end, span.end)
            else:
                self.intervals.append((span.start, span.end))
        self._starts = [start for start, _ in self.intervals]
        self._before = [0.0, *accumulate(end - start for start, end in self.intervals)]

    def gaps(self) -> list[tuple[float, float]]:
        return [(before[1], after[0]) for before, after in pairwise(self.intervals)]

    def idle(self, start: float, end: float) -> float:
        """How much of the time from `start` to `end` nothing ran."""
        return max(0.0, end - start - (self._until(end) - self._until(start)))

    def _until(self, time: float) -> float:
        """Busy time before `time`."""
        index = bisect_right(self._starts, time)
        if index == 0:
            return 0.0
        start, end = self.intervals[index - 1]
        return self._before[index - 1] + min(time, end) - start


@dataclass(frozen=True, slots=True)
class Step:
    """One step on the device, from its first work to the first of the next step (the last: its own
    last work).

    inside   idle time before its last work is done
    between  idle time after that; None for the last step
    """

    name: str
    is_recorded: bool
    begin: float
    time: float
    inside: float
    between: float | None

    @property
    def busy(self) -> float:
        return self.time - self.inside - (self.between or 0.0)


def steps_of(trace: Trace, busy: BusyTime) -> list[Step]:
    """The steps that did anything on the device, in order."""
    launched, recorded = _launches_by_step(trace)
    windows: dict[str, tuple[float, float]] = {}
    for span in trace.work:
        name = launched.get(span.correlation)
        if name is not None:
            begin, end = windows.get(name, (span.start, span.end))
            windows[name] = begin, max(end, span.end)
    ordered = sorted(windows.items(), key=lambda item: item[1])
    begins = [begin for _, (begin, _) in ordered]
    steps = []
    for (name, (begin, end)), next_begin in zip(ordered, [*begins, None][1:], strict=True):
        until = end if next_begin is None else next_begin
        inside = busy.idle(begin, min(end, until))
        between = None if next_begin is None else busy.idle(min(end, until), until)
        steps.append(Step(name, name in recorded, begin, until - begin, inside, between))
    return steps


def _launches_by_step(trace: Trace) -> tuple[dict[int | None, str], set[str]]:
    """Correlation id -> step, and the steps that launched a recorded graph."""
    starts = [step.start for step in trace.steps]
    launched: dict[int | None, str] = {}
    recorded = set()
    for launch in trace.launches:
        index = bisect_right(starts, launch.start) - 1
        if launch.correlation is None or index < 0 or trace.steps[index].end < launch.start:
            continue
        launched[launch.correlation] = trace.steps[index].name
        if launch.name in GRAPH_LAUNCHES:
            recorded.add(trace.steps[index].name)
    return launched, recorded


@dataclass(frozen=True, slots=True)
class Gap:
    """The device idle between two pieces of work.

    where     the step it is in, or the two it is between
    operator  what launched the work after it, as far as the trace tells
    lateness  when that was launched, counted from the begin of the gap: below 0 the work was there
              already and waited for something else than the host
    """

    time: float
    where: str
    before: str
    after: str
    operator: str
    lateness: float | None


def longest_gaps(trace: Trace, busy: BusyTime, steps: Sequence[Step], most: int) -> list[Gap]:
    launches = {launch.correlation: launch for launch in trace.launches}
    work_starts = [span.start for span in trace.work]
    begins = [step.begin for step in steps]
    longest = sorted(busy.gaps(), key=lambda gap: gap[0] - gap[1])[:most]
    found = []
    for start, end in longest:
        after = trace.work[bisect_right(work_starts, start)]
        before = next(span for span in trace.work if span.end == start)
        launch = launches.get(after.correlation)
        found.append(
            Gap(
                time=end - start,
                where=_where(steps, begins, start, end),
                before=before.name,
                after=after.name,
                operator=_operator_at(trace, launch) if launch else "?",
                lateness=launch.start - start if launch else None,
            )
        )
    return found


def _where(steps: Sequence[Step], begins: Sequence[float], start: float, end: float) -> str:
    first, last = bisect_right(begins, start) - 1, bisect_right(begins, end) - 1
    if first == last:
        return steps[first].name if first >= 0 else "before the first step"
    return f"{steps[first].name} | {steps[last].name}" if first >= 0 else "before the first step"


def _operator_at(trace: Trace, launch: Span) -> str:
    """The innermost operator a launch happened in, else the launch itself."""
    around = [span for span in trace.operators if span.start <= launch.start <= span.end]
    return min(around, key=lambda span: span.time, default=launch).name


def report(trace: Trace, *, num_gaps: int, num_kernels: int) -> Iterator[str]:
    """The lines to print; TraceError where the trace lacks what they are made from."""
    if not trace.work:
        raise TraceError("nothing ran on a GPU: it was recorded on a CPU, or without activity GPU")
    busy = BusyTime(trace.work)
    steps = steps_of(trace, busy)
    if not steps:
        raise TraceError("no work belongs to an annotation `step N`: was it recorded with CPU?")
    kinds = {
        "recorded steps": [step for step in steps if step.is_recorded],
        "other steps": [step for step in steps if not step.is_recorded],
    }
    for title, some in kinds.items():
        if some:
            yield from _step_table(title, some)
    yield f"{'longest gaps, us':18}{'step':22}{'launched after':>15}  by, before it > after it"
    for gap in longest_gaps(trace, busy, steps, num_gaps):
        late = "?" if gap.lateness is None else f"{gap.lateness:.1f}"
        names = f"{_short(gap.operator)}, {_short(gap.before)} > {_short(gap.after)}"
        yield f"{gap.time:<18.1f}{gap.where:22}{late:>15}  {names}"
    yield ""
    yield from _kernel_table(trace.work, num_kernels)


def _step_table(title: str, steps: Sequence[Step]) -> Iterator[str]:
    total = sum(step.time for step in steps)
    rows = {
        "step": [step.time for step in steps],
        "busy": [step.busy for step in steps],
        "idle inside": [step.inside for step in steps],
        "idle before next": [step.between for step in steps if step.between is not None],
    }
    yield f"{title + ', us':24}{'median':>10}{'p99':>10}{'share':>9}   ({len(steps)} steps)"
    for name, times in rows.items():
        if times:
            median, worst = statistics.median(times), percentile(times, 99)
            yield f"{name:24}{median:10.1f}{worst:10.1f}{sum(times) / total:9.1%}"
    yield ""


def _kernel_table(work: Iterable[Span], most: int) -> Iterator[str]:
    times: dict[str, list[float]] = defaultdict(list)
    for span in work:
        times[span.name].append(span.time)
    total = sum(map(sum, times.values()))
    yield f"{'kernels':{NAME_WIDTH}}{'total, ms':>12}{'share':>8}{'count':>9}{'mean, us':>11}"
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:most]:
        mean = statistics.mean(each)
        row = f"{sum(each) / 1e3:12.2f}{sum(each) / total:8.1%}{len(each):9}{mean:11.2f}"
        yield f"{_short(name, NAME_WIDTH - 1):{NAME_WIDTH}}{row}"


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of all do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def _short(name: str, width: int = NAME_WIDTH // 2) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


def read_events(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        events: list[dict[str, Any]] = content["traceEvents"]
    except (OSError, EOFError) as error:
        raise TraceError(f"cannot be read: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise TraceError("this is not a trace: no JSON object with traceEvents") from None
    return events


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help=".trace.json or .trace.json.gz")
    parser.add_argument("--gaps", type=int, default=10, help="how many of the longest gaps")
    parser.add_argument("--kernels", type=int, default=20, help="how many kernels")
    options = parser.parse_args()
    try:
        trace = Trace.of(read_events(options.trace))
        lines = report(trace, num_gaps=options.gaps, num_kernels=options.kernels)
        print("\n".join(lines))
    except TraceError as error:
        print(f"{options.trace}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
