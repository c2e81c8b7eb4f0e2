"""Programs on a backend that answers what the test says: order, variables, copies, errors."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from fake_backend import FakeBackend, wait_until

import sgl
from sgl.errors import ProgramAbortedError, UnknownVariableError


@pytest.fixture
def backend():
    return FakeBackend()


def run(body, backend, **how):
    return sgl.function(body).run(backend=backend, **how)


def test_text_and_answers_follow_in_the_order_they_were_added(backend):
    def body(s):
        s += "one " + sgl.gen("a") + " two " + sgl.gen("b")

    state = run(body, backend)
    assert state.text() == "one <4> two <12>"
    assert (state["a"], state["b"]) == ("<4>", "<12>")


def test_adding_does_not_wait(backend):
    backend.hold()

    def body(s):
        s += "q" + sgl.gen("a")
        s += "then"

    state = run(body, backend)
    assert "a" in state
    backend.let()
    assert state.text() == "q<1>then"


def test_a_name_used_twice_is_read_as_last_said(backend):
    def body(s):
        s += sgl.gen("x")
        first = s["x"]
        s += "more" + sgl.gen("x")
        return first, s["x"]

    assert run(body, backend).ret_value == ("<0>", "<7>")


def test_answers_without_names_do_not_collide(backend):
    def body(s):
        s += sgl.gen() + "," + sgl.gen() + "," + sgl.gen("c")

    state = run(body, backend)
    assert state.text() == "<0>,<4>,<8>"
    assert state["c"] == "<8>"


def test_control_flow_reads_what_was_chosen(backend):
    def body(s, question):
        s += question + sgl.select("tool", ["none", "calculator"])
        if s["tool"] == "calculator":
            s += " says " + sgl.gen("result")

    state = run(body, backend, question="2+2? ")
    assert state.text() == "2+2? calculator says <21>"
    assert state.get_meta_info("tool") == {"temperature": 0.0}


def test_roles_become_messages_and_marks(backend):
    def body(s):
        s += sgl.system("be short")
        s += sgl.user("hi")
        s += sgl.assistant(sgl.gen("a"))

    state = run(body, backend)
    answer = state["a"]
    assert state.messages() == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": answer},
    ]
    assert state.text() == (
        "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>\n"
    )
    assert backend.prompts[0].messages[:2] == state.messages()[:2]
    assert backend.prompts[0].begun == ""


def test_the_three_ways_to_write_a_role_are_one(backend):
    def expressions(s):
        s += sgl.user("hi") + sgl.assistant("a" + sgl.gen())

    def marks(s):
        s += sgl.user_begin() + "hi" + sgl.user_end()
        s += sgl.assistant_begin()
        s += "a" + sgl.gen()
        s += sgl.assistant_end()

    def scopes(s):
        with s.user():
            s += "hi"
        with s.assistant():
            s += "a"
            s += sgl.gen()

    def methods(s):
        s += s.user("hi")
        s += s.assistant("a" + sgl.gen())

    texts = {run(body, backend).text() for body in (expressions, marks, scopes, methods)}
    assert len(texts) == 1


def test_roles_inside_of_roles_are_refused_where_they_are_written(backend):
    with pytest.raises(RuntimeError, match="cannot be nested"):
        run(lambda s: s.__iadd__(sgl.user("a" + sgl.assistant("b"))), backend)


def test_a_scope_becomes_a_variable(backend):
    def body(s):
        with s.var_scope("all"):
            s += "a" + sgl.gen() + "b"
        s += "c"

    assert run(body, backend)["all"] == "a<1>b"


def test_copies_go_on_side_by_side_and_come_back_as_lists(backend):
    def body(s):
        s += "common "
        copies = s.fork(3)
        copies += lambda i: f"{i} " + sgl.gen("tip")
        copies.join()
        s += "after"

    state = run(body, backend)
    assert state["tip"] == ["<9>", "<9>", "<9>"]
    assert state.text() == "common after"


def test_long_text_is_computed_once_before_it_is_copied(backend):
    def body(s):
        s += "common" * 100
        for _ in range(2):  # the second time the backend has it already
            for copy in s.fork(3):
                copy += sgl.gen("tip")

    run(body, backend).sync()
    assert backend.prefilled == ["common" * 100]


def test_copies_are_at_work_at_the_same_time(backend):
    backend.hold()

    def body(s):
        for copy in s.fork(4):
            copy += sgl.gen("a")

    run(body, backend)
    assert wait_until(lambda: backend.num_running == 4)
    backend.let()


def test_copies_read_what_was_said_before_and_texts_can_be_appended(backend):
    def body(s):
        s += sgl.gen("first") + " "
        copies = s.fork(2)
        for i, copy in enumerate(copies):
            copy += f"{i}:{copy['first']} "
        copies.join("concate_and_append")

    assert run(body, backend).text() == "<0> 0:<0> 1:<0> "


def test_lists_grow_with_every_join_and_nest(backend):
    def body(s):
        for _ in range(2):
            copies = s.fork(2)
            copies += "x" + sgl.gen("a")
            copies.join()
        outer = s.fork(2)
        for copy in outer:
            inner = copy.fork(2)
            inner += sgl.gen("b")
            inner.join()
        outer.join()

    state = run(body, backend)
    assert state["a"] == ["<1>"] * 4
    assert state["b"] == [["<0>", "<0>"]] * 2


def test_a_copy_leaves_the_state_as_it_is(backend):
    def body(s):
        s += "a"
        with s.copy() as c:
            c += "b" + sgl.gen("x")
            s["seen"] = c["x"]
        s += "c"

    state = run(body, backend)
    assert state.text() == "ac"
    assert state["seen"] == "<2>"


def test_what_gen_says_goes_before_what_the_run_says(backend):
    def body(s):
        s += sgl.gen(temperature=0.5, stop="\n") + sgl.gen()

    run(body, backend, temperature=0.1, max_new_tokens=7, top_p=0.9).sync()
    first, second = backend.samplings
    assert (first.temperature, first.max_tokens, first.top_p, first.stop) == (0.5, 7, 0.9, ("\n",))
    assert (second.temperature, second.stop) == (0.1, None)


def test_what_went_wrong_is_raised_where_it_is_read_and_names_the_program():
    def fail(text):
        raise ConnectionError("the line is cut")

    def body(s):
        s += "kept" + sgl.gen("a")
        s += "not said" + sgl.gen("b")

    state = sgl.function(body).run(backend=FakeBackend(fail))
    with pytest.raises(ConnectionError, match="the line is cut") as caught:
        state["b"]
    assert caught.value.__notes__ == ["in program 'body', variable 'a'"]  # where it came up
    assert state.text() == "kept"
    assert isinstance(state.error(), ConnectionError)


def test_a_variable_that_nobody_sets_is_named(backend):
    state = run(lambda s: s.__iadd__(sgl.gen("right")), backend)
    with pytest.raises(UnknownVariableError, match="no variable 'wrong'; it has: right"):
        state["wrong"]
    with pytest.raises(KeyError):
        run(lambda s: s["never"], backend)


def test_when_a_state_fails_its_copies_hear_of_it():
    def fail(text):
        raise ConnectionError("gone")

    def body(s):
        s += sgl.gen("a")
        copies = s.fork(2)
        copies += sgl.gen("b")
        return copies[0]

    copy = sgl.function(body).run(backend=FakeBackend(fail)).ret_value
    with pytest.raises(ConnectionError, match="gone"):
        copy["b"]


def test_a_join_fails_with_the_copy_that_failed():
    def fail_second(text):
        if text.endswith("1"):
            raise ValueError("not this one")
        return "x"

    def body(s):
        copies = s.fork(2)
        copies += lambda i: str(i) + sgl.gen("a")
        copies.join()

    state = sgl.function(body).run(backend=FakeBackend(fail_second))
    with pytest.raises(ValueError, match="not this one"):
        state["a"]


def test_a_body_that_raises_is_raised_by_run_and_ends_what_is_at_work(backend):
    backend.hold()

    def body(s):
        s += sgl.gen("a")
        for copy in s.fork(2):
            copy += sgl.gen("b")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(body, backend)
    assert wait_until(lambda: backend.num_running == 0)


def test_streamed_text_comes_in_pieces_that_make_up_the_whole(backend):
    def body(s):
        s += "ask " + sgl.gen("a") + " end"

    state = run(body, backend, stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == state.text() == "ask <4> end"
    assert len(pieces) > 2


def test_a_variable_can_be_read_piece_by_piece_even_if_it_comes_late(backend):
    def body(s):
        time.sleep(0.05)
        s += sgl.gen("early")
        _ = s["early"]
        s += sgl.gen("late")

    state = run(body, backend, stream=True)
    assert "".join(state.text_iter("late")) == state["late"]


def test_a_streamed_variable_that_never_comes_is_an_error(backend):
    state = run(lambda s: s.__iadd__("text"), backend, stream=True)
    with pytest.raises(UnknownVariableError):
        list(state.text_iter("never"))


def test_a_streamed_body_that_raises_tells_its_reader(backend):
    def body(s):
        s += "begun"
        raise ZeroDivisionError

    state = run(body, backend, stream=True)
    with pytest.raises(ZeroDivisionError):
        list(state.text_iter())


def test_an_event_loop_can_read_several_at_a_time(backend):
    def body(s, word):
        s += word + sgl.gen("a")

    async def read(state):
        return "".join([piece async for piece, _ in state.text_async_iter("a", True)])

    async def read_all():
        program = sgl.function(body)
        states = [program.run(word, backend=backend, stream=True) for word in ("x", "yy")]
        return await asyncio.gather(*map(read, states))

    assert asyncio.run(read_all()) == ["<1>", "<2>"]


def test_a_meta_info_that_takes_too_long_is_not_waited_for(backend):
    backend.hold()
    state = run(lambda s: s.__iadd__(sgl.gen("a")), backend)
    with pytest.raises(TimeoutError):
        state.get_meta_info("a", timeout=0.05)
    backend.let()
    assert state.get_meta_info("a") == {"completion_tokens": 3}


def test_without_a_thread_everything_is_waited_for(backend):
    def body(s):
        s += sgl.gen("a")
        assert not backend.num_running
        assert backend.prompts

    run(body, backend, use_thread=False)


def test_arguments_are_bound_by_name_and_checked(backend):
    @sgl.function
    def program(s, a, b="B"):
        s += a + b

    assert program.bind(a="x").run(backend=backend).text() == "xB"
    assert program.run("1", "2", backend=backend).text() == "12"
    with pytest.raises(TypeError, match="no argument c"):
        program.bind(c=1)
    with pytest.raises(TypeError, match="missing a required argument: 'a'"):
        program.run(backend=backend)


def test_a_program_needs_its_state_and_a_backend():
    with pytest.raises(AssertionError, match="must be s"):
        sgl.function(lambda state: None)
    with pytest.raises(AssertionError, match="Please specify a backend"):
        sgl.function(lambda s: None).run()


def test_an_ended_program_tells_who_reads_it(backend):
    backend.hold()
    state = run(lambda s: s.__iadd__(sgl.gen("a")), backend)
    threading.Timer(0.05, state._execution.cancel).start()
    with pytest.raises(ProgramAbortedError):
        state["a"]
    assert wait_until(lambda: backend.num_cancelled == 1)


THINKING = "<think>\nTwo and two,\nthat is four.\n</think>\n\nIt is 4."


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("model_type", "answer", "thought", "said"),
    [
        ("deepseek-r1", THINKING, "Two and two,\nthat is four.", "It is 4."),
        (
            "deepseek-r1",
            THINKING.removeprefix("<think>\n"),
            "Two and two,\nthat is four.",
            "It is 4.",
        ),
        ("qwen3", THINKING, "Two and two,\nthat is four.", "It is 4."),
        ("qwen3", "It is 4.", "", "It is 4."),
        ("deepseek-r1", "Two and two", "Two and two", ""),
    ],
)
def test_what_a_model_thinks_is_kept_apart(is_streamed, model_type, answer, thought, said):
    backend = FakeBackend(lambda text: answer)

    @sgl.function
    def ask(s):
        s += sgl.user("What is 2 + 2?")
        s += sgl.assistant(
            sgl.separate_reasoning("" + sgl.gen("sum"), model_type) + sgl.gen("more")
        )

    state = ask.run(backend=backend, stream=is_streamed)
    assert state["sum"] == said
    assert state["sum_reasoning_content"] == thought
    assert state["more"] == answer, "only what was asked for is split"
    assert state.messages()[-1]["content"] == said + answer
    assert backend.prompts[1].text.endswith("assistant\n" + said)
    assert state.get_meta_info("sum_reasoning_content") == state.get_meta_info("sum")


def test_thoughts_of_an_unknown_kind_are_refused_where_they_are_asked_for():
    with pytest.raises(ValueError, match=r"model_type='r2': it is one of deepseek-r1, qwen3"):
        sgl.separate_reasoning(sgl.gen("x"), "r2")


def test_what_is_thought_can_be_read_piece_by_piece():
    backend = FakeBackend(lambda text: THINKING)

    @sgl.function
    def ask(s):
        s += sgl.separate_reasoning(sgl.gen("sum"))

    state = ask.run(backend=backend, stream=True)
    pieces = list(state.text_iter("sum_reasoning_content"))
    assert "".join(pieces) == "Two and two,\nthat is four."
    assert len(pieces) > 1


def failing(text):
    raise RuntimeError("no answer today")


@pytest.mark.parametrize(
    "read",
    [
        lambda state: state["a"],
        lambda state: state["b"],
        lambda state: list(state.text_iter()),
        lambda state: state.error() and failing(""),
    ],
)
def test_an_error_that_was_read_is_not_told_again(read, caplog):
    @sgl.function
    def ask(s):
        s += "x" + sgl.gen("a")

    def run_and_read():
        state = ask.run(backend=FakeBackend(failing))
        state.sync()
        assert repr(state) == "ProgramState(x, failed: RuntimeError('no answer today'))"
        with pytest.raises((RuntimeError, UnknownVariableError)):
            read(state)

    run_and_read()
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize("is_late", [False, True])
def test_an_error_that_nobody_read_is_told_once_in_the_log(is_late, caplog):
    backend = FakeBackend(failing)
    if is_late:
        backend.hold()

    @sgl.function
    def ask(s):
        s += "x" + sgl.gen("a")
        copies = s.fork(2)
        copies += sgl.gen("b")
        copies.join()

    state = ask.run(backend=backend)
    if not is_late:
        assert state.text() == "x"
    del state
    if is_late:
        backend.let()
    wait_until(lambda: gc.collect() >= 0 and bool(caplog.records))
    assert [record.message for record in caplog.records] == [
        "program 'ask' failed: RuntimeError('no answer today')"
    ]


def test_copies_that_all_fail_are_told_of_once(caplog):
    @sgl.function
    def ask(s):
        s += "x"
        copies = s.fork(3)
        copies += sgl.gen("a")
        copies.join()

    def run_and_read():
        with pytest.raises(RuntimeError, match="no answer today"):
            ask.run(backend=FakeBackend(failing))["a"]

    run_and_read()
    gc.collect()
    assert not caplog.records


def test_what_a_body_raises_is_told_by_run_alone(caplog):
    @sgl.function
    def ask(s):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        ask.run(backend=FakeBackend())
    with pytest.raises(ValueError, match="wrong"):
        ask.run_batch([{}, {}], backend=FakeBackend())
    gc.collect()
    assert not caplog.records


def test_a_variable_can_be_awaited(backend):
    backend.hold()

    @sgl.function
    def ask(s):
        s += "x" + sgl.gen("a")

    async def read(is_streamed):
        state = ask.run(backend=backend, stream=is_streamed)
        reading = asyncio.ensure_future(state.get_var_async("a"))
        await asyncio.sleep(0.05)
        assert not reading.done(), "the loop goes on meanwhile"
        backend.let()
        await state.sync_async()
        with pytest.raises(UnknownVariableError, match="'b'"):
            await state.get_var_async("b")
        return await reading

    for is_streamed in (False, True):
        assert asyncio.run(read(is_streamed)) == "<1>"
        backend.hold()
