"""Sessions without a server: which tokens a request goes on from, what is forgotten, and when."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl.actors import sessions as sessions_module
from sgl.actors.session_tree import NODE_TOKENS
from sgl.actors.sessions import SessionLimits, Sessions
from sgl.errors import InvalidRequestError, OverloadedError
from sgl.messages import Finish, TextDelta, pack
from sgl.protocol.body import convert
from sgl.protocol.call import Answer
from sgl.protocol.session import OpenSession, SessionParams

BOS = 1


class Texts:
    """Each token is a character."""

    added_id = BOS

    def num_chars(self, ids):
        return len(ids)


class Bench:
    """Sessions, one of which is open, and a clock."""

    def __init__(self, capacity=1000, **limits):
        self.now = 0.0
        given = {"max_sessions": 3, "timeout_s": 60.0} | limits
        self.sessions = Sessions(SessionLimits(**given), Texts(), lambda: self.now)
        self.id = self.open(capacity)
        self.nodes = {}

    def open(self, capacity=1000, session_id=None):
        wanted = OpenSession(capacity_of_str_len=capacity, session_id=session_id)
        return self.sessions.open(wanted)

    def begin(self, rid, ids, after=None, **params):
        """The prompt the request gets, or the `Finish` that is its answer."""
        wanted = convert({"id": self.id, "rid": after} | params, SessionParams)
        turn = self.sessions.find(wanted)
        if isinstance(turn, Finish):
            return turn
        prompt = self.sessions.prompt(turn, array("i", ids))
        self.sessions.check(turn, rid, prompt)
        self.interrupted = turn.interrupted()
        for node in [node for node in self.nodes.values() if node.request_id in self.interrupted]:
            self.end(node.rid, finish=Finish("abort", status=499))
        answer = Answer(index=0, rid=rid, prompt_ids=prompt)
        self.nodes[rid] = self.sessions.begin(turn, rid, len(self.nodes), answer)
        return prompt.tolist()

    def end(self, rid, output=(), finish=None):
        node = self.nodes.pop(rid)
        node.running.add(TextDelta(0, "", pack(output), finish or Finish("length")))
        self.sessions.end(node)

    def say(self, rid, ids, output, after=None, **params):
        prompt = self.begin(rid, ids, after, **params)
        self.end(rid, output)
        return prompt

    @property
    def session(self):
        return self.sessions._sessions[self.id]


def test_a_request_goes_on_from_prompt_and_answer_of_another():
    bench = Bench()
    assert bench.say("a", [BOS, 2], [3, 4]) == [BOS, 2]
    assert bench.say("b", [5], [6], after="a") == [BOS, 2, 3, 4, 5]
    assert bench.say("c", [7], [], after="b") == [BOS, 2, 3, 4, 5, 6, 7]
    assert bench.say("d", [8], [], after="c") == [BOS, 2, 3, 4, 5, 6, 7, 8]


def test_two_requests_branch_from_one():
    bench = Bench()
    bench.say("a", [2], [3])
    assert bench.say("b", [4], [5], after="a") == [2, 3, 4]
    assert bench.say("c", [6], [7], after="a") == [2, 3, 6]
    assert bench.say("d", [8], [9], after="b") == [2, 3, 4, 5, 8]


@pytest.mark.parametrize(
    ("offset", "kept"),
    [
        (None, [2, 3, 4, 5]),
        (0, [2, 3, 4, 5]),
        (-1, [2, 3, 4]),
        (1, [2]),
        (99, [2, 3, 4, 5]),
        (2**80, [2, 3, 4, 5]),
        (-99, []),
    ],
)
def test_an_offset_keeps_so_many_tokens(offset, kept):
    bench = Bench()
    bench.say("a", [2, 3], [4, 5])
    assert bench.say("b", [6], [], after="a", offset=offset) == [*kept, 6]
    assert bench.say("c", [7], [], after="b") == [*kept, 6, 7]


def test_an_offset_may_cut_what_a_grandparent_said():
    bench = Bench()
    bench.say("a", [2, 3, 4], [5])
    bench.say("b", [6], [7], after="a")
    assert bench.say("c", [8], [9], after="b", offset=2) == [2, 3, 8]
    assert bench.say("d", [], [], after="c", offset=-2) == [2, 3]


def test_the_token_that_begins_every_text_is_dropped_in_the_middle_alone():
    bench = Bench()
    assert bench.say("a", [BOS, 2], [3]) == [BOS, 2]
    assert bench.say("b", [BOS, BOS, 4], [5], after="a") == [BOS, 2, 3, BOS, 4]
    assert bench.say("c", [BOS, 6], [7]) == [BOS, 6]


def test_replace_forgets_what_followed_and_ends_it_where_it_runs():
    bench = Bench()
    bench.say("a", [2], [3])
    bench.say("b", [4], [5], after="a")
    bench.begin("c", [6], after="b")
    bench.begin("d", [7], after="a")
    running = sorted(node.request_id for node in bench.nodes.values())
    assert bench.say("e", [8], [9], after="a", replace=True) == [2, 3, 8]
    assert sorted(bench.interrupted) == running
    assert bench.say("f", [], [], after="e") == [2, 3, 8, 9]
    for gone in "bcd":
        assert bench.begin("x", [1], after=gone).status == 404
    assert bench.session.num_chars == 4
    assert bench.session.num_running == 0


def test_replace_ends_the_request_itself_and_goes_on_from_what_it_has_said():
    bench = Bench()
    bench.begin("a", [2])
    bench.nodes["a"].running.add(TextDelta(0, "", pack([3, 4])))
    assert bench.say("b", [5], [6], after="a", replace=True) == [2, 3, 4, 5]
    assert bench.say("c", [7], [8], after="a") == [2, 3, 4, 7]


def test_replace_without_a_request_clears_the_session():
    bench = Bench()
    bench.say("a", [2], [3])
    bench.begin("b", [4], after="a")
    assert bench.say("c", [5], [6], replace=True) == [5]
    assert bench.begin("d", [7], after="a").status == 404
    assert (bench.session.num_chars, bench.session.num_tokens) == (2, 2 + NODE_TOKENS)


def test_what_is_not_there_or_still_runs_is_told_in_the_answer():
    bench = Bench()
    bench.begin("a", [2])
    conflict = bench.begin("b", [3], after="a")
    assert (conflict.kind, conflict.status) == ("abort", 409)
    assert "'a' still runs" in conflict.message
    absent = bench.begin("b", [3], after="x")
    assert (absent.status, f"session {bench.id!r} has no request 'x'") == (404, absent.message)
    bench.sessions.close(bench.id)
    assert "there is no session" in bench.begin("b", [3]).message


def test_a_request_that_failed_is_forgotten_and_one_that_was_ended_is_not():
    bench = Bench()
    bench.begin("a", [2])
    bench.end("a", finish=Finish("abort", message="torn", status=500))
    assert bench.begin("b", [3], after="a").status == 404
    assert bench.session.num_tokens == 0
    bench.begin("c", [4])
    bench.end("c", [5], finish=Finish("abort", status=499))
    assert bench.say("d", [6], [], after="c") == [4, 5, 6]


def test_a_name_is_given_once():
    bench = Bench()
    bench.say("a", [2], [3])
    bench.say("b", [4], [5], after="a")
    with pytest.raises(InvalidRequestError, match="'b' is a request of the session"):
        bench.begin("b", [6], after="a")
    assert bench.say("b", [6], [], after="a", replace=True) == [2, 3, 6]


def test_the_capacity_counts_every_character_once():
    bench = Bench(capacity=6)
    bench.say("a", [2, 3], [4])
    bench.say("b", [5], [6], after="a")
    with pytest.raises(InvalidRequestError, match="holds 5 characters, this prompt has 2 more"):
        bench.begin("c", [7, 8], after="b")
    assert bench.say("c", [7], [8, 9], after="b") == [2, 3, 4, 5, 6, 7]
    with pytest.raises(InvalidRequestError, match=r"holds 8 .* is 6"):
        bench.begin("d", [1], after="c")
    assert bench.say("d", [7, 8], [], after="a", replace=True) == [2, 3, 4, 7, 8]


def test_all_sessions_together_are_bounded(monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_TOKENS", 2 * NODE_TOKENS + 10)
    bench = Bench()
    bench.say("a", [2], [3])
    bench.id = bench.open()
    bench.say("b", [2], [3])
    with pytest.raises(OverloadedError, match="hold too much together"):
        bench.begin("c", [4])


def test_only_so_many_can_be_open_and_a_name_is_taken_until_it_is_closed():
    bench = Bench()
    assert bench.open(session_id="mine") == "mine"
    with pytest.raises(InvalidRequestError, match="'mine' is open already"):
        bench.open(session_id="mine")
    bench.open()
    with pytest.raises(OverloadedError, match=r"3 sessions are open.*--max-sessions"):
        bench.open()
    bench.sessions.close("mine")
    bench.sessions.close("mine")
    assert bench.open(session_id="mine") == "mine"


def test_a_session_that_nobody_uses_is_closed():
    bench = Bench()
    bench.say("a", [2], [3])
    bench.now = 59.0
    bench.begin("b", [4], after="a")
    bench.now = 1000.0
    bench.sessions.sweep()
    assert len(bench.sessions) == 1, "a request of it runs"
    bench.end("b", [5])
    bench.now = 1060.0
    bench.sessions.sweep()
    assert len(bench.sessions) == 1
    bench.now = 1061.0
    assert "not used for long" in bench.begin("c", [6], after="b").message
    assert len(bench.sessions) == 0


def test_a_timeout_of_0_means_never():
    bench = Bench(timeout_s=0.0)
    bench.now = 1e9
    bench.sessions.sweep()
    assert bench.say("a", [2], []) == [2]


def test_a_closed_session_does_not_mind_the_end_of_its_requests():
    bench = Bench()
    bench.begin("a", [2])
    bench.sessions.close(bench.id)
    bench.end("a", [3])
    assert len(bench.sessions) == 0


def test_a_conversation_of_thousands_of_turns_holds_each_token_once():
    bench = Bench(capacity=10**6)
    bench.say("0", [2], [3])
    for turn in range(1, 3000):
        bench.say(str(turn), [4], [5], after=str(turn - 1))
    assert bench.session.num_tokens == 3000 * (2 + NODE_TOKENS)
    assert bench.begin("end", [6], after="2999") == [2, 3] + [4, 5] * 2999 + [6]
    bench.begin("new", [7], after="0", replace=True)
    assert bench.session.num_chars == 3


@given(st.data())
def test_random_trees_give_every_request_its_whole_history(data):
    """Against a model that keeps every text as a whole."""
    bench, texts, follows = Bench(capacity=10**6), {}, {}
    ids = st.lists(st.integers(2, 9), min_size=1, max_size=4)
    for number in range(data.draw(st.integers(1, 25))):
        rid, after = str(number), data.draw(st.sampled_from([None, *texts]))
        offset, replace = data.draw(st.integers(-3, 5)), data.draw(st.booleans())
        said, output = data.draw(ids), data.draw(ids)
        before = texts.get(after, [])[: offset or None] if after else []
        assert bench.say(rid, said, output, after, offset=offset, replace=replace) == before + said
        if replace:
            gone = set(texts) if after is None else {after}
            while more := {one for one in follows if follows[one] in gone} - gone:
                gone |= more
            for one in gone - {after}:
                del texts[one]
                follows.pop(one, None)
        texts[rid], follows[rid] = before + said + output, after
    session = bench.session
    assert set(session._nodes) == set(texts)
    nodes = session._nodes.values()
    assert session.num_chars == sum(len(node.own) for node in nodes)
    assert session.num_tokens == session.num_chars + NODE_TOKENS * len(texts)
