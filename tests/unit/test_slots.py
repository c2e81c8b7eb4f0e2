"""The page allocator: every page has one owner."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl.scheduling.slots import Slots


def test_all_pages_are_free_at_first_and_go_out_in_order():
    slots = Slots(num_pages=5, page_size=16)
    assert slots.num_free == slots.num_pages == 5
    assert slots.take(2) == array("i", [0, 1])
    assert slots.take(3) == array("i", [2, 3, 4])
    assert slots.num_free == 0


def test_taking_no_pages_takes_none():
    slots = Slots(4, 1)
    assert slots.take(0) == array("i")
    assert slots.num_free == 4


def test_a_run_that_was_given_back_comes_out_again_in_its_order():
    slots = Slots(100, 1)
    slots.take(10)
    run = slots.take(20)
    slots.give(run)
    assert slots.take(20) == run == array("i", range(10, 30))


@pytest.mark.parametrize("num_pages", [4, -1])
def test_taking_what_is_not_there_is_refused_and_takes_nothing(num_pages):
    slots = Slots(3, 1)
    with pytest.raises(AssertionError, match="took"):
        slots.take(num_pages)
    assert slots.num_free == 3


def test_giving_a_page_twice_is_found_by_the_audit():
    slots = Slots(4, 1)
    pages = slots.take(3)
    slots.give(pages[:1])
    slots.give(pages[:1])
    with pytest.raises(AssertionError, match=r"\[0\] were given back twice"):
        slots.check()


def test_giving_back_more_pages_than_there_are_is_noticed_at_once():
    slots = Slots(4, 1)
    with pytest.raises(AssertionError, match="given back twice"):
        slots.give(array("i", [2]))


@pytest.mark.parametrize("stranger", [-1, 4])
def test_giving_a_page_that_does_not_exist_is_found_by_the_audit(stranger):
    slots = Slots(4, 1)
    slots.take(1)
    slots.give(array("i", [stranger]))
    with pytest.raises(AssertionError, match="do not exist"):
        slots.check()


@given(st.lists(st.integers(0, 12), max_size=40), st.randoms(use_true_random=False))
def test_no_page_ever_has_two_owners(takes, rng):
    slots = Slots(30, 1)
    runs: list[array[int]] = []
    for num_pages in takes:
        while num_pages > slots.num_free:
            slots.give(runs.pop(rng.randrange(len(runs))))
        runs.append(slots.take(num_pages))
        slots.check()
        owned = [page for run in runs for page in run]
        assert len(owned) == len(set(owned)) == slots.num_pages - slots.num_free
        assert len(runs[-1]) == num_pages
