"""The scheduler actor between local channels and a fake worker."""

from __future__ import annotations

import io
import itertools
import json

from fake_worker import FakeMatcher, FakeWorker, expected_output, masked_output, vector_of

from sgl.actors.channel import LocalChannel
from sgl.actors.scheduler import Scheduler
from sgl.actors.step_log import StepLog
from sgl.errors import InvalidRequestError
from sgl.messages import (
    Abort,
    Control,
    Embed,
    Finish,
    Generate,
    GetWeight,
    NewTokens,
    OpenText,
    Reply,
    StartProfile,
    StepPlan,
    Stop,
    StopProfile,
    TokenMasks,
    UpdateWeights,
    pack,
    unpack,
)
from sgl.sampling_params import Grammar, GrammarKind, SamplingParams
from sgl.scheduling.batcher import Batcher
from sgl.scheduling.kv_store import KvStore
from sgl.scheduling.limits import Limits


class Clock:
    now = 0.0

    def __call__(self):
        self.now += 0.001
        return self.now


class FakeCompiler:
    """Knows the grammar "kept" at once, compiles others when told to, and refuses "[" then."""

    def __init__(self):
        self.submitted, self.done = {}, []
        self.has_forgotten = False

    def forget(self):
        self.has_forgotten = True

    def find(self, grammar):
        return FakeMatcher() if grammar.text == "kept" else None

    def submit(self, key, grammar):
        self.submitted[key] = grammar

    def finish_all(self):
        for key, grammar in self.submitted.items():
            is_wrong = grammar.text == "["
            self.done.append((key, InvalidRequestError("[?") if is_wrong else FakeMatcher()))
        self.submitted.clear()

    def receive(self):
        done, self.done = self.done, []
        return done


class Bench:
    """The actor's neighbours: what they sent, and what they were told."""

    def __init__(
        self, num_pages=64, text_room=None, trace=None, num_workers=1, gives_vectors=False
    ):
        self.requests, self.stops, self.results = (LocalChannel() for _ in range(3))
        self.plans = [LocalChannel() for _ in range(num_workers)]
        self.text = LocalChannel(max_messages=text_room)
        self.compiler = FakeCompiler()
        limits = Limits(max_step_tokens=16, max_rows=8, max_total_len=num_pages)
        self.scheduler = Scheduler(
            Batcher(KvStore(num_pages, 1), limits),
            requests=self.requests.receiver,
            stops=self.stops.receiver,
            results=self.results.receiver,
            workers=[channel.sender for channel in self.plans],
            text=self.text.sender,
            log=StepLog(40, trace, Clock()),
            grammars=self.compiler,
        )
        self.worker = FakeWorker(num_pages, 1, gives_vectors)
        self.backlog = []
        self.masks = {}
        self.told = []
        self.orders = []

    def ask(self, request_id, prompt, grammar=None, **sampling):
        kind = GrammarKind.REGEX
        message = Generate(
            request_id,
            pack(prompt),
            SamplingParams(**sampling),
            grammar=grammar and Grammar(kind, grammar),
        )
        self.requests.sender.send(message)

    def turn(self):
        """One turn of the scheduler; then the worker finishes one step."""
        is_busy = self.scheduler.turn()
        self.told += self.text.receiver.receive()
        plans = [channel.receiver.receive() for channel in self.plans]
        assert all(seen == plans[0] for seen in plans), "the ranks get different plans"
        self.masks |= {one.step: one for one in plans[0] if isinstance(one, TokenMasks)}
        self.orders += [one for one in plans[0] if isinstance(one, UpdateWeights | GetWeight)]
        self.backlog += [one for one in plans[0] if isinstance(one, StepPlan)]
        if self.backlog:
            plan = self.backlog.pop(0)
            self.results.sender.send(self.worker.run(plan, self.masks.pop(plan.step, None)))
        return is_busy

    def run_until_idle(self):
        for _ in range(1000):
            if not self.turn() and not self.backlog and not self.scheduler.is_blocked:
                return
        raise AssertionError("the scheduler does not come to rest")

    def deltas(self, request_id):
        return [
            delta
            for message in self.told
            if isinstance(message, NewTokens)
            for delta in message.deltas
            if delta.request_id == request_id
        ]

    def output(self, request_id):
        return [token for delta in self.deltas(request_id) for token in unpack(delta.token_ids)]


def test_tokens_go_to_the_detokenizer_after_the_announcement():
    bench = Bench()
    bench.ask(1, [1, 2, 3], max_new_tokens=5, stop=("x",))
    bench.run_until_idle()
    assert bench.told[0] == OpenText(1, ("x",))
    assert bench.output(1) == expected_output([1, 2, 3], 5)
    assert bench.deltas(1)[-1].finish == Finish("length", length=5)


def test_every_rank_gets_every_plan():
    bench = Bench(num_workers=3)
    bench.ask(1, [1, 2, 3], max_new_tokens=5)
    bench.run_until_idle()
    assert bench.output(1) == expected_output([1, 2, 3], 5)


def test_whoever_asks_for_too_much_hears_back():
    bench = Bench(num_pages=16)
    bench.ask(1, list(range(20)))
    bench.run_until_idle()
    [delta] = bench.deltas(1)
    assert delta.finish.status == 400
    assert "20 tokens" in delta.finish.message


def test_an_aborted_request_is_told_to_have_ended():
    bench = Bench()
    bench.ask(1, [1, 2, 3], max_new_tokens=50)
    for _ in range(5):
        bench.turn()
    bench.requests.sender.send(Abort(1))
    bench.requests.sender.send(Abort(99))
    bench.run_until_idle()
    assert bench.deltas(1)[-1].finish.status == 499
    assert not bench.scheduler.batcher.requests


def test_a_stop_string_ends_a_request_without_a_word():
    bench = Bench()
    bench.ask(1, [1, 2, 3], max_new_tokens=50)
    for _ in range(5):
        bench.turn()
    bench.stops.sender.send(Stop(1))
    bench.run_until_idle()
    assert not bench.scheduler.batcher.requests
    assert all(delta.finish is None for delta in bench.deltas(1))
    assert bench.scheduler.batcher.totals.num_finished == 1


def test_flush_answers_whether_it_flushed():
    bench = Bench()
    bench.ask(1, [1, 2, 3], max_new_tokens=5)
    bench.requests.sender.send(Control(7, "flush_cache"))
    bench.turn()
    [refusal] = [message for message in bench.told if isinstance(message, Reply)]
    assert not refusal.ok
    bench.run_until_idle()
    bench.requests.sender.send(Control(8, "flush_cache"))
    bench.run_until_idle()
    assert bench.told[-1] == Reply(8, ok=True, text="Cache flushed.")
    assert bench.scheduler.batcher.store.slots.num_free == 64
    assert bench.compiler.has_forgotten


def test_weights_are_replaced_between_what_runs_and_what_waits():
    bench = Bench(num_workers=2)
    bench.ask(1, [1, 2, 3], max_new_tokens=5)
    bench.turn()
    bench.requests.sender.send(UpdateWeights(7, "new"))
    bench.ask(2, [1, 2, 3], max_new_tokens=4)
    bench.run_until_idle()
    assert bench.output(1) == expected_output([1, 2, 3], 5)
    assert bench.output(2) == []
    assert bench.orders == [UpdateWeights(7, "new")]
    status = bench.scheduler.read_status()
    assert (status.is_loading, status.num_queue_reqs) == (1, 1)
    bench.results.sender.send(Reply(7, ok=True, text="Loaded."))
    bench.run_until_idle()
    assert bench.output(2) == expected_output([1, 2, 3], 4)
    assert bench.deltas(2)[0].num_cached == 0, "the old KV is of the old weights"
    assert Reply(7, ok=True, text="Loaded.") in bench.told
    assert bench.scheduler.read_status().is_loading == 0


def test_an_update_that_failed_keeps_the_cache():
    bench = Bench()
    bench.ask(1, [1, 2, 3], max_new_tokens=5)
    bench.turn()
    bench.requests.sender.send(UpdateWeights(7, "new"))
    bench.requests.sender.send(UpdateWeights(8, "newer"))
    bench.run_until_idle()
    assert [message.call_id for message in bench.orders] == [7]
    [refusal] = [message for message in bench.told if isinstance(message, Reply)]
    assert (refusal.call_id, refusal.ok) == (8, False)
    assert "the weights of new are being loaded" in refusal.text
    bench.results.sender.send(Reply(7, ok=False, text="torn"))
    bench.run_until_idle()
    assert bench.told[-1] == Reply(7, ok=False, text="torn")
    bench.ask(2, [1, 2, 3], max_new_tokens=4)
    bench.run_until_idle()
    assert bench.deltas(2)[0].num_cached == 2


def test_requests_can_be_aborted_while_weights_are_loaded():
    bench = Bench()
    bench.requests.sender.send(UpdateWeights(7, "new"))
    bench.ask(1, [1, 2, 3], max_new_tokens=5)
    bench.run_until_idle()
    bench.requests.sender.send(Abort(1))
    bench.run_until_idle()
    assert bench.deltas(1)[-1].finish.status == 499
    bench.results.sender.send(Reply(7, ok=True, text="Loaded."))
    bench.run_until_idle()
    assert not bench.scheduler.batcher.requests


def test_requests_that_were_retracted_end_before_weights_are_replaced():
    bench = Bench(num_pages=30)
    prompts = {request_id: [request_id, 2, 3] for request_id in range(3)}
    for request_id, prompt in prompts.items():
        bench.ask(request_id, prompt, max_new_tokens=16)
    for _ in range(4):
        bench.turn()
    begun = {one.request_id for one in bench.scheduler.batcher.running}
    assert len(begun) > 1
    bench.requests.sender.send(UpdateWeights(7, "new"))
    bench.run_until_idle()
    assert bench.scheduler.batcher.totals.num_retractions > 0
    for request_id in begun:
        assert bench.output(request_id) == expected_output(prompts[request_id], 16)
    for request_id in prompts.keys() - begun:
        assert bench.output(request_id) == []
    assert len(bench.orders) == 1


def test_a_question_about_a_weight_goes_to_every_rank_at_once():
    bench = Bench(num_workers=2)
    bench.requests.sender.send(GetWeight(7, "norm.weight", 3))
    bench.run_until_idle()
    assert bench.orders == [GetWeight(7, "norm.weight", 3)]


def test_profile_orders_keep_their_place_among_the_plans_of_every_rank():
    bench = Bench(num_workers=2)
    bench.requests.sender.send(StartProfile(7, "now"))
    bench.ask(1, [1, 2, 3], max_new_tokens=3)
    bench.scheduler.turn()
    bench.requests.sender.send(StopProfile(8))
    bench.scheduler.turn()
    seen = [channel.receiver.receive() for channel in bench.plans]
    assert [type(message) for message in seen[0]] == [StartProfile, StepPlan, StepPlan, StopProfile]
    assert seen[1] == seen[0]


def test_the_reply_of_a_worker_is_passed_on():
    bench = Bench()
    reply = Reply(7, ok=False, text="no profile is running")
    bench.results.sender.send(reply)
    bench.run_until_idle()
    assert bench.told == [reply]


def test_abort_all_ends_everybody():
    bench = Bench()
    for request_id in range(5):
        bench.ask(request_id, [request_id, 1], max_new_tokens=50)
    bench.turn()
    bench.requests.sender.send(Control(1, "abort_all"))
    bench.run_until_idle()
    assert bench.told[-1] == Reply(1, ok=True, text="Aborted 5 requests.")
    assert not bench.scheduler.batcher.requests


def test_a_full_ring_to_the_detokenizer_holds_planning_up_and_loses_nothing():
    bench = Bench(text_room=1)
    for request_id in range(4):
        bench.ask(request_id, [request_id, 1, 2], max_new_tokens=10)
    bench.run_until_idle()
    for request_id in range(4):
        assert bench.output(request_id) == expected_output([request_id, 1, 2], 10)


def test_the_status_tells_what_runs_and_what_is_used():
    bench = Bench()
    bench.ask(1, [1, 2, 3], max_new_tokens=50)
    bench.turn()
    status = bench.scheduler.read_status()
    assert (status.num_running_reqs, status.num_queue_reqs) == (1, 0)
    assert status.num_used_tokens >= 3
    assert status.max_total_tokens == 64


def test_the_trace_shows_each_step_planned_before_the_last_result():
    trace = io.BytesIO()
    bench = Bench(num_pages=300, trace=trace)
    bench.ask(1, [1, 2, 3], max_new_tokens=200)
    bench.run_until_idle()
    steps = [json.loads(line) for line in trace.getvalue().splitlines()]
    early = sum(after["sent"] < step["arrived"] for step, after in itertools.pairwise(steps))
    assert len(steps) == 200
    assert early == 199


def test_a_request_waits_for_its_grammar_and_nobody_waits_for_it():
    bench = Bench(num_pages=200)
    bench.ask(1, [1, 2], grammar="kept", max_new_tokens=4)
    bench.ask(2, [3, 4], grammar="new", max_new_tokens=4)
    bench.ask(3, [5, 6], max_new_tokens=4)
    bench.run_until_idle()
    assert bench.output(1) == masked_output([1, 2], 4)
    assert bench.output(3) == expected_output([5, 6], 4)
    assert bench.output(2) == []
    bench.compiler.finish_all()
    bench.run_until_idle()
    assert bench.output(2) == masked_output([3, 4], 4)


def test_a_wrong_grammar_is_told_to_whoever_asked():
    bench = Bench()
    bench.ask(1, [1, 2], grammar="[", max_new_tokens=4)
    bench.run_until_idle()
    bench.compiler.finish_all()
    bench.run_until_idle()
    [delta] = bench.deltas(1)
    assert delta.finish == Finish("abort", message="[?", status=400)
    assert not bench.scheduler.batcher.requests


def test_a_request_is_aborted_while_its_grammar_is_compiled():
    bench = Bench()
    bench.ask(1, [1, 2], grammar="new", max_new_tokens=4)
    bench.ask(2, [1, 2], grammar="new", max_new_tokens=4)
    bench.run_until_idle()
    bench.requests.sender.send(Abort(1))
    bench.run_until_idle()
    assert bench.deltas(1)[-1].finish.status == 499
    bench.requests.sender.send(Control(1, "abort_all"))
    bench.run_until_idle()
    assert bench.told[-1] == Reply(1, ok=True, text="Aborted 1 requests.")
    bench.compiler.finish_all()
    bench.run_until_idle()
    assert bench.output(1) == bench.output(2) == []


def test_only_rank_0_gets_masks():
    bench = Bench(num_workers=2)
    bench.ask(1, [1, 2], grammar="kept", max_new_tokens=3)
    bench.scheduler.turn()
    first, second = (channel.receiver.receive() for channel in bench.plans)
    assert [type(message) for message in first] == [StepPlan, TokenMasks, StepPlan]
    assert second == [message for message in first if isinstance(message, StepPlan)]


def test_vectors_take_the_way_of_tokens():
    bench = Bench(gives_vectors=True)
    prompts = {1: [1, 2, 3], 2: list(range(40)), 3: [4]}
    for request_id, prompt in prompts.items():
        bench.requests.sender.send(Embed(request_id, pack(prompt)))
    bench.requests.sender.send(Embed(4, pack(range(65))))
    bench.run_until_idle()
    assert [one for one in bench.told if isinstance(one, OpenText)] == [
        OpenText(request_id, interval=0) for request_id in (1, 2, 3, 4)
    ]
    for request_id, prompt in prompts.items():
        [delta] = bench.deltas(request_id)
        assert (delta.vector, delta.token_ids) == (vector_of(prompt), b"")
        assert delta.finish == Finish("length", length=0)
    [refusal] = bench.deltas(4)
    assert (refusal.finish.kind, refusal.finish.status) == ("abort", 400)


def test_a_prompt_is_aborted_between_two_of_its_chunks():
    bench = Bench(gives_vectors=True)
    bench.requests.sender.send(Embed(1, pack(range(60))))
    bench.turn()
    bench.requests.sender.send(Abort(1))
    bench.run_until_idle()
    [delta] = bench.deltas(1)
    assert (delta.finish.status, delta.vector) == (499, b"")
    assert not bench.scheduler.batcher.requests
    bench.scheduler.batcher.check()
