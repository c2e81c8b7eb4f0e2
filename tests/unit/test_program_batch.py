"""`run_batch`: order, limits, bodies that wait, errors, and what a waiting program costs."""

from __future__ import annotations

import threading
import time
import tracemalloc

import pytest
from fake_backend import FakeBackend, wait_until

import sgl


@pytest.fixture
def backend():
    return FakeBackend()


@sgl.function
def ask(s, question):
    s += question + sgl.gen("answer")


def test_states_come_in_the_order_of_their_arguments(backend):
    states = ask.run_batch([{"question": "q" * n} for n in range(50)], backend=backend)
    assert [state["answer"] for state in states] == [f"<{n}>" for n in range(50)]
    assert ask.run_batch([], backend=backend) == []


def test_arguments_may_be_positional_and_are_counted(backend):
    assert ask.run_batch([["x"], ("yy",)], backend=backend)[1].text() == "yy<2>"
    with pytest.raises(Exception, match="Given arguments mismatch the SGL function signature"):
        ask.run_batch([["x", "y"]], backend=backend)


def test_bodies_that_wait_do_not_hold_up_others(backend):
    backend.hold()

    @sgl.function
    def wait(s, n):
        s += sgl.gen("a")
        s += s["a"] + sgl.gen("b")
        return s["b"]

    done = []
    thread = threading.Thread(
        target=lambda: done.extend(wait.run_batch([{"n": n} for n in range(300)], backend=backend))
    )
    thread.start()
    assert wait_until(lambda: backend.num_running == 300)
    backend.let()
    thread.join(10)
    assert [state.ret_value for state in done] == ["<6>"] * 300


def test_bodies_that_are_busy_elsewhere_do_not_hold_up_others(backend):
    everybody = threading.Barrier(8)

    @sgl.function
    def meet(s, n):
        everybody.wait(timeout=10)
        s += sgl.gen("a")

    meet.run_batch([{"n": n} for n in range(8)], backend=backend)


def test_a_lock_held_while_a_body_waits_stops_nobody_for_ever(backend):
    lock, total = threading.Lock(), []

    @sgl.function
    def count(s, n):
        s += sgl.gen("a")
        with lock:
            total.append(s["a"])

    count.run_batch([{"n": n} for n in range(100)], backend=backend)
    assert len(total) == 100


def test_no_more_than_asked_for_are_at_work(backend):
    ask.run_batch([{"question": "q"} for _ in range(40)], backend=backend, num_threads=3)
    assert 1 <= backend.num_most <= 3


def test_an_iterator_gives_states_as_they_get_ready(backend):
    states = ask.run_batch([{"question": "q"}] * 700, backend=backend, generator_style=True)
    assert next(states)["answer"] == "<1>"
    assert sum(1 for _ in states) == 699


def test_a_body_that_raises_ends_the_batch_at_once(backend):
    backend.hold()

    @sgl.function
    def fragile(s, n):
        s += sgl.gen("a")
        if n == 7:
            raise ZeroDivisionError
        return s["a"]

    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError) as caught:
        fragile.run_batch([{"n": n} for n in range(20)], backend=backend)
    assert time.monotonic() - begun < 2
    assert caught.value.__notes__[-1] == "in run 7 of the batch"
    assert wait_until(lambda: backend.num_running == 0)


def test_one_answer_that_fails_leaves_the_others():
    def fail_one(text):
        if text == "bad":
            raise ConnectionError("gone")
        return "fine"

    questions = [{"question": word} for word in ("good", "bad", "good")]
    states = ask.run_batch(questions, backend=FakeBackend(fail_one))
    assert [state["answer"] for state in (states[0], states[2])] == ["fine", "fine"]
    with pytest.raises(ConnectionError):
        states[1]["answer"]


def test_a_progress_bar_ends_where_the_batch_does(backend, capfd):
    ask.run_batch([{"question": "q"}] * 5, backend=backend, progress_bar=True)
    assert "5/5" in capfd.readouterr().err


def test_a_waiting_program_takes_less_than_five_kilobytes(backend):
    backend.hold()
    number = 2000
    arguments = [{"question": "q"} for _ in range(number)]
    states = []
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    thread = threading.Thread(
        target=lambda: states.extend(ask.run_batch(arguments, backend=backend, num_threads=number))
    )
    thread.start()
    assert wait_until(lambda: backend.num_running == number)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    backend.let()
    thread.join(20)
    assert len(states) == number
    assert used / number <= 5 * 1024
