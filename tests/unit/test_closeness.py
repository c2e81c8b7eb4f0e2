"""The distance of two runs' log-probabilities, for some that are known."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "scripts" / "gpu_steps" / "closeness.py"


@pytest.fixture(scope="module")
def closeness():
    spec = importlib.util.spec_from_file_location("closeness", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their own types up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def distance(closeness):
    """Of two runs over one text, as lists of a token and what is known beside it."""

    def measure(ours, theirs):
        runs = [[[closeness.Position(*position) for position in run]] for run in (ours, theirs)]
        return closeness.Distance.between(*runs)

    return measure


def far(distance, by):
    return distance([(1, {1: -1.0})], [(1, {1: -1.0 - by})])


def test_positions_have_the_token_the_best_ones_and_those_asked_for(closeness):
    meta = {
        "input_token_logprobs": [[None, 4, None], [-2.0, 5, None]],
        "input_top_logprobs": [None, [[-0.5, 6, None]]],
        "input_token_ids_logprobs": [None, [[-9.0, 0, None]]],
        "output_token_logprobs": [[-0.25, 7, None]],
        "output_top_logprobs": [[[-0.25, 7, None]]],
        "output_token_ids_logprobs": [[[-8.0, 0, None]]],
    }
    assert closeness.positions({"meta_info": meta}) == [
        closeness.Position(5, {5: -2.0, 6: -0.5, 0: -9.0}),
        closeness.Position(7, {7: -0.25, 0: -8.0}),
    ]


def test_only_tokens_that_both_know_are_compared(distance):
    found = distance(
        [(1, {1: -1.0, 2: -3.0, 9: -50.0}), (4, {4: -2.0})],
        [(1, {1: -1.5, 2: -3.25, 8: -70.0}), (4, {4: -2.0})],
    )
    assert (found.num, found.num_chosen) == (3, 2)
    assert (found.max_abs, found.mean) == (0.5, 0.25)
    assert found.p99 == pytest.approx(0.495)
    assert (found.chosen_max, found.chosen_mean) == (0.5, 0.25)


def test_nothing_is_compared_behind_the_first_token_that_differs(distance):
    found = distance(
        [(1, {1: -1.0}), (2, {2: -1.0, 3: -1.25}), (5, {5: -1.0})],
        [(1, {1: -1.0}), (3, {2: -1.5, 3: -1.0}), (5, {5: -90.0})],
    )
    assert (found.num, found.num_chosen) == (3, 1)
    assert (found.max_abs, found.chosen_max) == (0.5, 0.0)


def test_figures_are_short_and_counts_whole(distance):
    figures = far(distance, 0.123456).figures()
    assert figures["max_abs"] == figures["chosen_mean"] == 0.123
    assert figures["num"] == figures["num_chosen"] == 1


@pytest.mark.parametrize(
    ("gap", "floor", "expected"),
    [
        (0.01, None, True),
        (0.01, 0.5, True),
        (0.03, None, False),
        (0.03, 0.015, False),
        (0.03, 0.5, None),
        (math.nan, 0.5, False),
    ],
)
def test_beyond_the_bar_only_a_floor_beyond_it_leaves_the_question_open(
    distance, gap, floor, expected
):
    floor = None if floor is None else far(distance, floor)
    assert far(distance, gap).is_close(floor) is expected


@pytest.mark.parametrize(("gap", "expected"), [(0.7, True), (1.1, False), (math.nan, False)])
def test_an_error_is_like_the_floor_up_to_twice_its_size(distance, gap, expected):
    assert far(distance, gap).is_like(far(distance, 0.5)) is expected


def test_runs_over_other_texts_are_no_pair(closeness):
    text = [closeness.Position(1, {1: -1.0})]
    with pytest.raises(ValueError, match="zip"):
        closeness.Distance.between([text], [text, text])
