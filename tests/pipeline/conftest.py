"""Engines to ask, answers of `transformers` to compare with, and the lines that tests print."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from reference import Comparison, Reference

import sgl

GAUGES = ("num_running_reqs", "num_queue_reqs", "num_used_tokens")
COMPARED = "compared with transformers"
STRUCTURED = "answers under grammars"
STREAMS = "streams beside evil grammars"
SECTIONS = (COMPARED, STRUCTURED, STREAMS)  # names of properties whose values are printed


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference.load()


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Callable[..., Comparison]:
    """Begins a comparison: the name of its mode, then the fields that have defaults."""
    properties = request.node.user_properties
    return lambda mode, **fields: Comparison(
        mode, lambda line: properties.append((COMPARED, line)), **fields
    )


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[sgl.Engine]:
    """An engine in float32 with the flags of the test's indirect parameter.

    In the end, when nobody asks it anything, all of its memory must be free. It computes in one
    thread: where the cores are shared, several wait for the slowest of them in every layer.
    """
    defaults = {"dtype": "float32", "num_cpu_threads": 1, "random_seed": 0}
    flags = defaults | getattr(request, "param", {})
    with sgl.Engine(**flags) as engine:
        yield engine
        _check_is_idle(engine)


def _check_is_idle(engine: sgl.Engine) -> None:
    """The last answer may come a moment before the scheduler's last numbers."""
    end = time.monotonic() + 5
    while any(left := _gauges(engine)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(left), f"nothing is asked any more, and {GAUGES} are {left}"


def _gauges(engine: sgl.Engine) -> list[float]:
    info = engine.get_server_info()
    return [info[name] for name in GAUGES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    properties = [
        named
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for named in report.user_properties
    ]
    for section in SECTIONS:
        if lines := [line for name, line in properties if name == section]:
            terminalreporter.section(section)
            for line in lines:
                terminalreporter.write_line(str(line))
