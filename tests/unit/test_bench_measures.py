"""Numbers of a run, checked by hand, and how they are shown."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET

import pytest

from sgl.bench import plot, report
from sgl.bench.discovery import Target
from sgl.bench.load import Exchange, Run
from sgl.bench.measures import (
    Measures,
    Spread,
    content_tokens,
    measure,
    peak_concurrency,
    spread,
    timing,
)
from sgl.bench.servers import Answer
from sgl.bench.settings import ServingConfig

CONFIG = ServingConfig(api_key="hush", goodput=("ttft:150", "itl:250"))
TARGET = Target("some-model", None, None, 32000)


def answer(sent: float, *chunks: float, num: int | None = None, **named) -> Answer:
    return Answer(
        sent_s=sent,
        end_s=named.pop("end", chunks[-1] if chunks else sent),
        chunk_times=list(chunks),
        num_output=num,
        **{"num_input": 10} | named,
    )


# A: TTFT 100 ms, gaps 200 and 100, 5 tokens: TPOT 300 / 4.  B: TTFT 200 ms, gap 100, 2 tokens.
A = answer(10.0, 10.1, 10.3, 10.4, num=5, num_cached=4)
B = answer(10.2, 10.4, 10.5, num=2, num_cached=6)
FAILED = answer(10.3, end=12.0, error="status 503: full")


def measured(*answers: Answer, goals=None) -> Measures:
    run = Run([Exchange("a prompt of 23 letters.", each) for each in answers], 0.1)
    return measure(run, goals or {}, None)


def test_one_request():
    found = timing(A, 5)
    assert (found.e2e, found.ttft, found.tpot) == pytest.approx((400, 100, 75))
    assert found.gaps == pytest.approx([200, 100])


def test_one_token_has_no_time_per_further_token_and_a_whole_answer_only_its_end():
    found = timing(answer(1.0, 1.5), 1)
    assert (found.ttft, found.tpot, list(found.gaps)) == (500, None, [])
    found = timing(answer(1.0, end=3.0), 4)
    assert (found.e2e, found.ttft, found.tpot, list(found.gaps)) == (2000, None, None, [])


def test_a_run():
    found = measured(A, B, FAILED)
    assert (found.completed, found.failed, found.duration_s) == (2, 1, 2.0)
    assert (found.num_input, found.num_output, found.num_cached) == (20, 7, 10)
    assert found.rate(found.num_output) == 3.5
    assert found.mean_concurrency == pytest.approx((0.4 + 0.3) / 2)
    assert found.peak_concurrency == 3
    assert found.spreads["ttft"].mean == pytest.approx(150)
    assert found.spreads["itl"].median == pytest.approx(100)
    assert found.spreads["itl"].mean == pytest.approx(400 / 3)
    assert found.spreads["tpot"].mean == pytest.approx((75 + 100) / 2)
    assert found.spreads["e2e"].median == pytest.approx(350)
    assert found.num_good is None


def test_percentiles_are_interpolated():
    found = spread([float(value) for value in range(101)])
    assert found == Spread(50, 50, 90, 95, 99)
    assert spread([10.0, 20.0]).p90 == pytest.approx(19)
    assert spread([]) is None


@pytest.mark.parametrize(
    ("goals", "num_good"),
    [
        ({"ttft": 100.5}, 1),
        ({"ttft": 200.5}, 2),
        ({"itl": 199}, 1),
        ({"itl": 201, "ttft": 150}, 1),
        ({"tpot": 80}, 1),
        ({"e2e": 250}, 0),
        ({"e2e": 1000, "tpot": 1000}, 2),
    ],
)
def test_good_requests_keep_every_limit(goals, num_good):
    assert measured(A, B, FAILED, goals=goals).num_good == num_good


def test_tokens_are_counted_where_the_server_does_not():
    silent = answer(1.0, 1.1, 1.2, 1.3, num_input=None)
    found = measured(silent)
    assert (found.num_output, found.num_input, found.num_cached) == (3, 23 // 4, None)
    assert content_tokens([1, 2, 3], None) == 3
    assert content_tokens([{"role": "user", "content": "twelve chars"}], None) == 3


def test_requests_that_touch_do_not_overlap():
    spans = [(0.0, 1.0), (1.0, 2.0), (0.5, 1.5)]
    assert peak_concurrency([answer(start, end=end) for start, end in spans]) == 2
    assert peak_concurrency([]) == 0


# tables


def test_the_table_says_everything_in_words():
    found = measured(A, B, FAILED, goals=CONFIG.goals)
    lines = report.table(CONFIG, TARGET, 2.0, found).splitlines()
    assert lines[0] == "random to sgl at http://127.0.0.1:30000 (some-model), 2 requests/s"
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "requests 2 done, 1 FAILED, in 2.00 s" in text
    assert "input tokens per second 10.0 (20 in all, 50% of them from the cache)" in text
    assert "good requests per second 0.50 (33% keep ttft ≤ 150 ms, itl ≤ 250 ms)" in text
    assert "TTFT time to first token 150.0 150.0 190.0 195.0 199.0" in text
    assert "1 x status 503: full" in text
    assert "core" not in text


def test_when_everything_fails_only_the_errors_are_shown():
    text = report.table(CONFIG, TARGET, math.inf, measured(FAILED, FAILED))
    assert "2 x status 503: full" in text
    assert "TTFT" not in text


def test_a_busy_client_is_told():
    run = Run([Exchange("a", A)], 0.97)
    assert "used 97% of a core" in report.table(CONFIG, TARGET, 1.0, measure(run, {}, None))


def test_the_json_line_has_settings_and_measures_but_no_key():
    line = report.record(CONFIG, TARGET, math.inf, measured(A, B, FAILED, goals=CONFIG.goals))
    text = json.dumps(line, allow_nan=False)
    assert "hush" not in text
    again = json.loads(text)
    assert (again["backend"], again["request_rate"], again["seed"]) == ("sgl", "inf", 1)
    assert (again["completed"], again["failed"], again["duration"]) == (2, 1, 2.0)
    assert (again["total_output_tokens"], again["output_throughput"]) == (7, 3.5)
    assert again["request_goodput"] == 0.5
    assert again["mean_ttft_ms"] == pytest.approx(150)
    assert again["p99_e2e_latency_ms"] == pytest.approx(399)
    assert again["errors"] == {"status 503: full": 1}


def test_details_tell_each_request_in_the_order_of_starts():
    first, second = report.details(Run([Exchange("a", B), Exchange("a", A)], 0.0))
    assert (first["sent"], first["output_tokens"]) == (0.0, 5)
    assert second["sent"] == pytest.approx(0.2)
    assert second["chunks"] == pytest.approx([0.4, 0.5])


def test_rates_are_compared_line_by_line():
    lines = report.comparison([2.0, math.inf], [measured(A), measured(FAILED)]).splitlines()
    assert lines[1].split() == ["2", "2.50", "12.5", "100.0", "100.0", "150.0", "199.0", "0"]
    assert lines[2].split() == ["inf", "0.00", "0.0", "-", "-", "-", "-", "1"]


# pictures


@pytest.mark.parametrize(
    ("most", "last"), [(0.9, "1"), (97, "100"), (100, "100"), (101, "125"), (1234, "1,250")]
)
def test_ticks_are_round_and_end_just_above_the_largest_value(most, last):
    found = plot.ticks(most)
    assert found[0] == (0, "0")
    assert found[-1][1] == last
    assert found[-1][0] >= most > found[-2][0]
    assert 3 <= len(found) <= 7


def drawing(rates: list[float], runs: list[Measures]) -> ET.Element:
    return ET.fromstring(plot.draw(rates, runs))


def texts(root: ET.Element) -> list[str]:
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def lines_of(root: ET.Element) -> list[list[tuple[float, float]]]:
    found = root.iter("{http://www.w3.org/2000/svg}polyline")
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        for line in found
    ]


def test_one_run_is_drawn_as_three_distributions():
    root = drawing([math.inf], [measured(A, B)])
    assert {"Time to first token", "Time between chunks", "Whole request"} < set(texts(root))
    for points in lines_of(root):
        xs, ys = zip(*points, strict=True)
        assert list(xs) == sorted(xs)
        assert (ys[0], ys[-1]) == (plot._TOP + plot._HEIGHT, plot._TOP)


def test_several_rates_are_drawn_as_curves():
    root = drawing([2.0, 4.0, math.inf], [measured(A), measured(A, B), measured(B)])
    assert {"2", "4", "inf", "median", "p99"} < set(texts(root))
    assert [len(points) for points in lines_of(root)] == [3, 3, 3, 3]


def test_what_was_not_streamed_or_failed_can_be_drawn_too():
    whole = measured(answer(1.0, end=3.0, num=4))
    assert "Time to first token (not measured)" in texts(drawing([1.0], [whole]))
    drawing([1.0, 2.0], [measured(FAILED), measured(FAILED)])
