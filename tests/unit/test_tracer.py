"""Programs whose bodies are run once, without values: `trace`, `cache`, `compile`."""

from __future__ import annotations

import pytest
from fake_backend import FakeBackend

import sgl


@pytest.fixture
def backend():
    return FakeBackend()


def in_both_ways(body, backend, **arguments):
    """The texts of a program, as it is and compiled."""
    program = sgl.function(body)
    plain = program.run(backend=backend, **arguments).text()
    return plain, program.compile().run(backend=backend, **arguments).text()


def reads_a_value_in_a_copy(s, a, b="B"):
    s += a + b + sgl.gen("x")
    forks = s.fork(2)
    forks += lambda index: f"[{index}" + sgl.gen("t")
    s += forks[1]["t"]
    forks.join()


def joins_other_copies_first(s, a):
    first, second = s.fork(2), s.fork(3)
    first += sgl.gen("x")
    second += sgl.gen("y")
    with s.copy() as copy:
        copy += "apart" + sgl.gen("z")
    first.join("concate_and_append")
    s += a
    second.join("concate_and_append")


def sets_variables(s, a):
    s["y"] = "Y"
    s["same"] = a
    s += a + sgl.gen("x")
    s["z"] = s["x"]
    s += s["y"] + s["same"] + s["z"]


def goes_back_and_forth_between_copies(s, a):
    forks = s.fork(2)
    s += a + sgl.gen("y")
    forks[0] += s["y"] + sgl.gen("z")
    s += forks[0]["z"]


def keeps_thoughts(s, a):
    s += a + sgl.separate_reasoning(sgl.gen("x"))
    s += s["x_reasoning_content"]


@pytest.mark.parametrize(
    "body",
    [
        reads_a_value_in_a_copy,
        joins_other_copies_first,
        sets_variables,
        goes_back_and_forth_between_copies,
        keeps_thoughts,
    ],
)
def test_a_compiled_program_says_what_the_program_says(body, backend):
    plain, compiled = in_both_ways(body, backend, a="A")
    assert compiled == plain


def branches_on_a_variable(s, q):
    s += q + sgl.gen("tool", choices=["calc", "search"])
    s += " search" if s["tool"] == "search" else " calc"


def branches_on_an_argument(s, q):
    s += "hard" if q == "hard" else "easy"


def repeats_until_a_value(s, q):
    s += q + sgl.gen("t")
    while s["t"] != "done":
        s += sgl.gen("t")


def writes_what_it_cannot_know(s, q):
    s += f"{q!r}"


def asks_whether_there_is_one(s, q):
    if q:
        s += q


def looks_it_up(s, q):
    s += {"a": "b"}.get(q, "c")


def limits_an_answer(s, q):
    s += sgl.gen("x", max_tokens=q)


def makes_a_list(s, q):
    s["x"] = [q]


def takes_any(s, *q):
    s += "".join(q)


@pytest.mark.parametrize(
    "body",
    [
        branches_on_a_variable,
        branches_on_an_argument,
        repeats_until_a_value,
        writes_what_it_cannot_know,
        asks_whether_there_is_one,
        looks_it_up,
        limits_an_answer,
        makes_a_list,
        takes_any,
    ],
)
def test_what_needs_values_cannot_be_compiled(body):
    with pytest.raises(ValueError, match=f"{body.__name__} cannot be compiled"):
        sgl.function(body).compile()


def test_a_trace_is_written_for_people(capsys):
    program = sgl.function(sets_variables)
    program.trace().print_graph()
    written = capsys.readouterr().out
    assert "same = a" in written
    assert "Argument(a)" in written
    assert "Value(z)" in written
