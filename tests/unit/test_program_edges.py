"""What programs meet at their edges: readers beside a body, scopes that break off, many copies."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from fake_backend import FakeBackend

import sgl
from sgl.errors import UnknownVariableError

ROOT = Path(__file__).parents[2]
PROMPT_S = 5.0


@pytest.fixture
def backend():
    return FakeBackend()


def run(body, backend, **how):
    return sgl.function(body).run(backend=backend, **how)


def in_time(work):
    """What it gives or raises; fails where it takes too long."""
    found = []

    def do():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(PROMPT_S)
    assert found, "it waits for ever"
    return found[0]


def late(s):
    s += "a"
    time.sleep(0.1)
    s += "b" + sgl.user("?") + sgl.gen("x")
    return 5


def test_a_streamed_program_is_read_when_its_body_is_over(backend):
    assert run(late, backend, stream=True).text().endswith(">")
    assert run(late, backend, stream=True).messages() == [{"role": "user", "content": "?"}]
    assert run(late, backend, stream=True).ret_value == 5
    assert run(late, backend, stream=True).get_meta_info("x")["completion_tokens"] > 0


def test_an_error_that_a_streamed_body_raises_late_is_told(backend):
    def body(s):
        time.sleep(0.1)
        raise KeyError("late")

    assert isinstance(run(body, backend, stream=True).error(), KeyError)


def test_a_meta_info_that_is_not_declared_in_time_is_not_waited_for(backend):
    state = run(late, backend, stream=True)
    with pytest.raises(TimeoutError):
        state.get_meta_info("x", timeout=0.01)


def test_a_streamed_body_that_raises_ends_what_is_at_work(backend):
    backend.hold()

    def body(s):
        s += sgl.gen("x")
        while backend.num_running == 0:
            time.sleep(0.001)
        raise KeyError("oh")

    state = run(body, backend, stream=True)
    assert isinstance(in_time(lambda: state["x"]), KeyError)
    until = time.monotonic() + PROMPT_S
    while backend.num_cancelled == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert backend.num_cancelled == 1


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_body_reads_its_own_text_piece_by_piece(is_streamed, backend):
    def body(s):
        s += "hi" + sgl.gen("x")
        return list(s.text_iter()), list(s.fork(1)[0].text_iter())

    state = run(body, backend, stream=is_streamed)
    own, copied = in_time(lambda: state.ret_value)
    assert "".join(own) == "".join(copied) == "hi<2>"


def test_text_that_is_not_streamed_comes_at_once(backend):
    backend.hold()

    def body(s):
        s += "hi" + sgl.gen("x")

    state = run(body, backend)
    pieces = state.text_iter()
    threading.Timer(0.05, backend.let).start()
    assert in_time(lambda: list(pieces)) == ["hi<2>"]


def test_of_a_name_used_twice_one_answer_is_read_piece_by_piece():
    backend = FakeBackend(lambda text: "12345678" if "A" in text else "ABCDEFGH")

    def body(s):
        s += sgl.gen("x")
        s["x"]
        s += sgl.gen("x")

    for _ in range(50):
        pieces = "".join(run(body, backend, stream=True).text_iter("x"))
        assert pieces in ("ABCDEFGH", "12345678")


def test_a_scope_that_breaks_off_ends_there(backend):
    def body(s):
        with suppress(KeyError), s.var_scope("x"):
            s += "a"
            raise KeyError
        with suppress(KeyError), s.user():
            s += "b"
            raise KeyError
        s += sgl.assistant("c")

    state = run(body, backend)
    assert state["x"] == "a"
    assert [message["content"] for message in state.messages()] == ["b", "c"]


def test_a_scope_is_not_read_inside_of_itself(backend):
    def body(s):
        with s.var_scope("x"):
            s += "a" + sgl.gen("y")
            s["y"]
            with pytest.raises(RuntimeError, match="which has not ended"):
                s["x"]
            s += s.fork(1)[0]["y"]

    assert in_time(lambda: run(body, backend)["x"]) == "a<1><1>"


def test_scopes_of_one_name_nest(backend):
    def body(s):
        with s.var_scope("x"):
            s += "a"
            with s.var_scope("x"):
                s += "b"
            return s["x"]

    assert in_time(lambda: run(body, backend).ret_value) == "b"


def test_what_is_added_while_an_answer_fails_does_not_keep_its_reader_waiting():
    class Failing(FakeBackend):
        async def generate(self, prompt, sampling):
            await asyncio.sleep(0.01)
            raise ValueError("bad")

    def body(s):
        for number in range(5000):
            s += sgl.gen(f"v{number}")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        state = run(body, Failing())
        assert isinstance(in_time(lambda: state["v0"]), ValueError)
    finally:
        sys.setswitchinterval(before)


def test_copies_that_are_over_are_forgotten(backend):
    def body(s):
        for _ in range(500):
            with s.copy() as copy:
                copy += sgl.gen("x")
                copy.sync()
        return len(s._execution._copies)

    assert run(body, backend).ret_value < 50


def test_copies_of_copies_end_however_deep(backend):
    def body(s):
        for _ in range(3000):
            s = s.fork(1)[0]
        s += sgl.gen("x")
        return s["x"]

    assert in_time(lambda: run(body, backend).ret_value) == "<0>"


def test_more_arguments_than_names(backend):
    @sgl.function
    def program(s, a, /, b="B", *rest, **named):
        s += a + b + "".join(rest) + "".join(named.values())

    assert program.run("a", backend=backend).text() == "aB"
    assert program.run("a", "b", "c", "d", e="e", backend=backend).text() == "abcde"
    assert program.bind(b="x").run("a", "c", backend=backend).text() == "axc"
    states = program.run_batch([("1",), ["1", "2", "3"]], backend=backend)
    assert [state.text() for state in states] == ["1B", "123"]
    with pytest.raises(TypeError, match="multiple values"):
        sgl.function(lambda s, a: None).run("1", a="2", backend=backend)


def test_a_body_that_would_never_run_is_refused():
    async def waits(s):
        s += "a"

    def yields(s):
        yield

    for body in (waits, yields):
        with pytest.raises(TypeError, match="plain function"):
            sgl.function(body)


def test_names_and_choices_of_other_kinds(backend):
    def body(s):
        s[5] = "five"
        s += sgl.select("x", iter(["a", "b"]))
        s["nothing"]

    with pytest.raises(UnknownVariableError, match="it has: 5, x"):
        run(body, backend)
    with pytest.raises(TypeError, match="name of a variable"):
        sgl.gen(5)


def test_a_script_may_end_while_an_answer_is_being_made():
    script = (
        "import sgl\n"
        "from fake_backend import FakeBackend\n"
        "backend = FakeBackend()\n"
        "backend.hold()\n"
        "state = sgl.function(lambda s: s.__iadd__(sgl.gen('x'))).run(backend=backend)\n"
        "while backend.num_running == 0: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
