"""The batcher against a worker that is always one step late."""

from __future__ import annotations

import random
from collections import deque

import pytest
from fake_worker import (
    VOCAB,
    FakeMatcher,
    FakeWorker,
    expected_output,
    masked_output,
    vector_of,
)

from sgl.errors import PromptTooLongError
from sgl.messages import Embed, Finish, Generate, LogprobOptions, StepResult, pack, unpack
from sgl.sampling_params import SamplingParams
from sgl.scheduling import jump_forward
from sgl.scheduling.batcher import Batcher
from sgl.scheduling.kv_store import KvStore
from sgl.scheduling.limits import Limits
from sgl.scheduling.request import Request

LEFT = Finish("abort", message="left", status=499)


class Bench:
    """A batcher and a fake worker; results come back as late as the pipeline is deep."""

    def __init__(
        self, num_pages=64, page_size=1, max_step_tokens=16, max_rows=8, eos=(), depth=2, **options
    ):
        self.worker = FakeWorker(num_pages, page_size, options.pop("gives_vectors", False))
        self.store = KvStore(num_pages, page_size, is_cached=options.pop("is_cached", True))
        limits = Limits(
            max_step_tokens=max_step_tokens,
            max_rows=max_rows,
            max_total_len=options.pop("max_total_len", num_pages * page_size),
            min_prompt_tokens=options.pop("min_prompt_tokens", max_step_tokens),
            max_in_flight=depth,
        )
        self.batcher = Batcher(self.store, limits, eos_ids=frozenset(eos), **options)
        self.plans = deque()
        self.outputs: dict[int, list[int]] = {}
        self.finishes: dict[int, Finish] = {}
        self.num_cached: dict[int, int] = {}
        self.vectors: dict[int, bytes] = {}

    def embed(self, request_id, prompt, namespace=""):
        self.outputs[request_id] = []
        self.batcher.add(Embed(request_id, pack(prompt), namespace))

    def ask(self, request_id, prompt, max_new_tokens=4, matcher=None, **sampling):
        params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
        self.outputs[request_id] = []
        self.batcher.add(Generate(request_id, pack(prompt), params), matcher)

    def leave(self, request_id):
        if delta := self.batcher.end(request_id, LEFT):
            self.finishes[request_id] = delta.finish

    def plan(self):
        while plan := self.batcher.plan():
            self.plans.append(plan)
        self.batcher.check()

    def step(self, result=None):
        """Plan as far as possible, then let the oldest step finish."""
        self.plan()
        if not self.plans:
            return False
        plan = self.plans.popleft()
        computed = self.worker.run(plan, self.batcher.due_masks())
        self.take(self.batcher.commit((result and result(plan)) or computed))
        self.batcher.check()
        return True

    def take(self, deltas):
        for delta in deltas:
            assert delta.request_id not in self.finishes, "tokens after the end"
            self.outputs[delta.request_id] += unpack(delta.token_ids)
            self.num_cached[delta.request_id] = delta.num_cached
            if delta.finish:
                self.finishes[delta.request_id] = delta.finish
                self.vectors[delta.request_id] = delta.vector

    def run_until_idle(self, max_steps=5000):
        for _ in range(max_steps):
            if not self.step():
                assert not self.batcher.requests, "requests are left and nothing is planned"
                return
        raise AssertionError("the batcher does not come to an end")

    def assert_empty(self):
        self.batcher.check()
        assert self.batcher.flush()
        assert self.store.slots.num_free == self.store.num_pages


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_request_gets_what_the_model_says(depth, page_size):
    bench = Bench(page_size=page_size, depth=depth)
    bench.ask(1, [1, 2, 3], max_new_tokens=6)
    bench.run_until_idle()
    assert bench.outputs[1] == expected_output([1, 2, 3], 6)
    assert bench.finishes[1] == Finish("length", length=6)
    bench.assert_empty()


def test_the_next_step_is_planned_before_the_result_of_this_one():
    bench = Bench()
    bench.ask(1, [1, 2, 3], max_new_tokens=10)
    for _ in range(5):
        bench.plan()
        assert len(bench.plans) == 2
        bench.step()


def test_a_request_that_ends_by_length_is_never_planned_too_far():
    bench = Bench()
    bench.ask(1, [1, 2, 3], max_new_tokens=5)
    bench.run_until_idle()
    assert bench.worker.num_tokens == 3 + 4


def test_the_token_after_an_end_of_sequence_is_dropped():
    prompt = [3, 1, 2]
    eos = expected_output(prompt, 3)[-1]
    bench = Bench(eos=[eos])
    bench.ask(1, prompt, max_new_tokens=20)
    bench.run_until_idle()
    assert bench.outputs[1] == expected_output(prompt, 20, {eos})
    assert bench.finishes[1] == Finish("stop", matched=eos)
    bench.assert_empty()


@pytest.mark.parametrize(("num", "finish"), [(2, "length"), (3, "length"), (4, "stop")])
def test_the_number_of_tokens_counts_before_an_end_of_sequence(num, finish):
    prompt = [3, 1, 2]
    bench = Bench(eos=[expected_output(prompt, 3)[-1]])
    bench.ask(1, prompt, max_new_tokens=num)
    bench.run_until_idle()
    assert bench.finishes[1].kind == finish
    bench.assert_empty()


def test_ignore_eos_goes_on():
    prompt = [3, 1, 2]
    eos = expected_output(prompt, 3)[-1]
    bench = Bench(eos=[eos])
    bench.ask(1, prompt, max_new_tokens=8, ignore_eos=True)
    bench.run_until_idle()
    assert len(bench.outputs[1]) == 8


def test_no_new_tokens_means_prefill_only():
    bench = Bench()
    bench.ask(1, [1, 2, 3, 4], max_new_tokens=0)
    bench.run_until_idle()
    assert bench.outputs[1] == []
    assert bench.finishes[1] == Finish("length", length=0)


def test_the_second_time_all_but_one_prompt_token_is_cached():
    bench = Bench()
    for request_id in (1, 2):
        bench.ask(request_id, [1, 2, 3, 4, 5])
        bench.run_until_idle()
    assert bench.num_cached == {1: 0, 2: 4}
    assert bench.outputs[1] == bench.outputs[2]


def test_generated_tokens_are_cached_for_the_next_turn():
    bench = Bench()
    bench.ask(1, [1, 2, 3], max_new_tokens=5)
    bench.run_until_idle()
    bench.ask(2, [1, 2, 3, *bench.outputs[1], 7], max_new_tokens=2)
    bench.run_until_idle()
    assert bench.num_cached[2] == 3 + 5 - 1  # KV of the last generated token was never needed


def test_without_the_cache_nothing_is_shared():
    bench = Bench(is_cached=False)
    for request_id in (1, 2):
        bench.ask(request_id, [1, 2, 3, 4, 5])
        bench.run_until_idle()
    assert bench.num_cached == {1: 0, 2: 0}
    assert bench.store.slots.num_free == bench.store.num_pages


def test_namespaces_do_not_share():
    bench = Bench()
    for request_id, namespace in ((1, "a"), (2, "b"), (3, "a")):
        params = SamplingParams(max_new_tokens=2)
        bench.outputs[request_id] = []
        message = Generate(request_id, pack([1, 2, 3, 4]), params, namespace=namespace)
        bench.batcher.add(message)
        bench.run_until_idle()
    assert bench.num_cached == {1: 0, 2: 0, 3: 3}


def test_a_shared_prefix_is_computed_once_and_the_others_wait_for_it():
    bench = Bench(num_pages=400, max_step_tokens=64)
    prefix = list(range(48))
    for request_id in range(4):
        bench.ask(request_id, [*prefix, request_id], max_new_tokens=3)
    bench.run_until_idle()
    assert [bench.num_cached[request_id] for request_id in range(4)] == [0, 48, 48, 48]
    for request_id in range(4):
        assert bench.outputs[request_id] == expected_output([*prefix, request_id], 3)


def test_long_prompts_never_stall_other_streams():
    bench = Bench(num_pages=512, max_step_tokens=16)
    bench.ask(1, [1, 2], max_new_tokens=60)
    bench.step()
    bench.ask(2, list(range(200)), max_new_tokens=2)
    for _ in range(20):
        before = len(bench.outputs[1])
        bench.step()
        assert len(bench.outputs[1]) == before + 1


def test_a_prompt_that_can_never_fit_is_refused():
    bench = Bench(num_pages=16)
    with pytest.raises(PromptTooLongError, match="16"):
        bench.ask(1, list(range(16)))
    bench.ask(2, list(range(15)), max_new_tokens=100)
    bench.run_until_idle()
    assert bench.finishes[2] == Finish("length", length=1)


@pytest.mark.parametrize("offset", range(14))
@pytest.mark.parametrize("depth", [1, 2])
def test_an_abort_is_valid_at_every_moment(offset, depth):
    bench = Bench(num_pages=40, max_step_tokens=4, depth=depth)
    bench.ask(1, list(range(12)), max_new_tokens=6)
    bench.ask(2, [5, 6, 7], max_new_tokens=6)
    for _ in range(offset):
        bench.step()
    bench.leave(1)
    bench.leave(1)
    bench.run_until_idle()
    assert bench.outputs[2] == expected_output([5, 6, 7], 6)
    assert bench.outputs[1] == expected_output(list(range(12)), 6)[: len(bench.outputs[1])]
    bench.assert_empty()


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("num_pages", range(20, 44, 3))
def test_requests_retracted_at_any_point_lose_nothing(num_pages, page_size):
    bench = Bench(num_pages=num_pages, page_size=page_size, conservativeness=0.0)
    prompts = {request_id: [request_id] * 3 for request_id in range(6)}
    length = 12 * page_size
    for request_id, prompt in prompts.items():
        bench.ask(request_id, prompt, max_new_tokens=length)
    bench.run_until_idle()
    assert bench.batcher.totals.num_retractions > 0
    for request_id, prompt in prompts.items():
        assert bench.outputs[request_id] == expected_output(prompt, length)
    bench.assert_empty()


def test_sixteen_long_requests_in_a_pool_for_one_all_finish():
    longest = 40
    bench = Bench(num_pages=int(1.3 * longest), max_rows=16)
    retractions = dict.fromkeys(range(16), 0)
    for request_id in range(16):
        bench.ask(request_id, [request_id, 1, 2, 3], max_new_tokens=longest - 4)
    requests = dict(bench.batcher.requests)
    bench.run_until_idle()
    retractions = {key: request.num_retractions for key, request in requests.items()}
    assert max(retractions.values()) <= 3
    assert bench.worker.num_steps <= 3 * 16 * (longest - 4)
    assert all(len(output) == longest - 4 for output in bench.outputs.values())


def test_a_cold_request_does_not_starve_among_cache_hits():
    bench = Bench(num_pages=200, max_rows=1, max_step_tokens=64)
    bench.ask(0, list(range(40)), max_new_tokens=1)
    bench.run_until_idle()
    bench.ask(1, [49] * 40, max_new_tokens=1)
    for request_id in range(2, 100):
        bench.ask(request_id, [*range(40), request_id % VOCAB], max_new_tokens=1)
        bench.ask(request_id + 1000, [*range(40), request_id % VOCAB], max_new_tokens=1)
        bench.step()
        if 1 in bench.finishes:
            break
    assert 1 in bench.finishes


@pytest.mark.parametrize("policy", ["lpm", "fcfs", "dfs-weight", "random"])
def test_every_policy_serves_everybody(policy):
    bench = Bench(num_pages=300, policy=policy)
    rng = random.Random(0)
    prompts = [[rng.randrange(3) for _ in range(rng.randrange(1, 30))] for _ in range(40)]
    for request_id, prompt in enumerate(prompts):
        bench.ask(request_id, prompt)
    bench.run_until_idle()
    for request_id, prompt in enumerate(prompts):
        assert bench.outputs[request_id] == expected_output(prompt, 4)
    bench.assert_empty()


def test_a_prompt_beside_streams_comes_in_small_pieces():
    bench = Bench(num_pages=500, max_step_tokens=64, min_prompt_tokens=4)
    bench.ask(1, [1, 2, 3], max_new_tokens=40)
    bench.step()
    bench.ask(2, list(range(50)), max_new_tokens=2)
    lens = []

    def note(plan):
        lens.extend(len(chunk.token_ids) // 4 for chunk in plan.chunks)

    while 2 not in bench.finishes:
        bench.step(note)
    assert lens == [8] * 5 + [10]  # 4, and 4 for the stream
    bench.run_until_idle()
    assert bench.outputs[1] == expected_output([1, 2, 3], 40)


def test_lpm_prefers_the_longest_cached_prefix():
    bench = Bench(num_pages=200, max_rows=1)
    bench.ask(0, list(range(20)), max_new_tokens=1)
    bench.run_until_idle()
    bench.ask(1, [9] * 20, max_new_tokens=1)
    bench.ask(2, [*range(20), 30], max_new_tokens=1)
    bench.run_until_idle()
    assert list(bench.finishes) == [0, 2, 1]


def test_a_failed_step_ends_its_requests_and_no_others():
    bench = Bench(num_pages=200, max_step_tokens=8)
    bench.ask(1, [1, 2, 3], max_new_tokens=8)
    bench.step()
    bench.plan()
    bench.ask(2, [4, 5, 6], max_new_tokens=8)
    bench.step(lambda plan: StepResult(plan.step, b"", error="out of memory"))
    assert bench.finishes[1].kind == "abort"
    assert bench.finishes[1].status == 500
    bench.run_until_idle()
    assert bench.outputs[2] == expected_output([4, 5, 6], 8)
    bench.assert_empty()


def test_a_prompt_that_failed_ends_alone():
    bench = Bench(num_pages=200)
    bench.ask(1, [1, 2, 3], max_new_tokens=8)
    bench.step()
    bench.ask(2, [4, 5, 6], max_new_tokens=8)
    bench.ask(3, [7, 8, 9], max_new_tokens=8)
    bench.step()  # was planned before they came
    bench.plan()
    plan = bench.plans.popleft()
    decoded, _, third = unpack(bench.worker.run(plan).token_ids)
    tokens = pack([decoded, -1, third])
    failed = StepResult(plan.step, tokens, error="out of memory", failed=pack([1]))
    bench.take(bench.batcher.commit(failed))
    assert set(bench.finishes) == {2}
    assert bench.finishes[2].status == 500
    assert "out of memory" in bench.finishes[2].message
    bench.run_until_idle()
    assert bench.outputs[1] == expected_output([1, 2, 3], 8)
    assert bench.outputs[3] == expected_output([7, 8, 9], 8)
    bench.assert_empty()


def test_a_token_that_is_no_number_ends_its_request_alone():
    bench = Bench()
    bench.ask(1, [1, 2, 3], max_new_tokens=8)
    bench.ask(2, [4, 5, 6], max_new_tokens=8)
    bench.plan()
    first = bench.plans.popleft()
    good = unpack(bench.worker.run(first).token_ids)
    bench.take(bench.batcher.commit(StepResult(first.step, pack([-1, good[1]]))))
    assert bench.finishes[1].status == 500
    bench.run_until_idle()
    assert bench.outputs[2] == expected_output([4, 5, 6], 8)


def test_flush_is_refused_while_a_request_runs():
    bench = Bench()
    bench.ask(1, [1, 2, 3])
    assert not bench.batcher.flush()
    bench.run_until_idle()
    assert bench.batcher.flush()


def test_flush_does_not_wait_for_the_step_planned_too_many():
    bench = Bench(eos=range(VOCAB))
    bench.ask(1, [1, 2, 3], max_new_tokens=9)
    bench.step()
    assert 1 in bench.finishes
    assert bench.batcher.in_flight
    bench.assert_empty()
    bench.ask(2, [1, 2, 3], ignore_eos=True)
    bench.run_until_idle()
    assert bench.outputs[2] == expected_output([1, 2, 3], 4)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_keeps_every_page_and_every_token(seed, page_size):
    rng = random.Random(seed)
    bench = Bench(
        num_pages=rng.choice([60, 200]) // page_size + 8,
        page_size=page_size,
        max_step_tokens=rng.choice([3, 16, 64]),
        max_rows=rng.choice([2, 8]),
        max_total_len=60,
        eos=[0],
        depth=rng.choice([1, 2]),
        policy=rng.choice(["lpm", "fcfs", "dfs-weight", "random"]),
        conservativeness=rng.choice([0.0, 1.0]),
        is_cached=rng.random() < 0.8,
    )
    asked = {}
    for request_id in range(120):
        prompt = [rng.randrange(1, 3) for _ in range(rng.randrange(1, 40))]
        asked[request_id] = (prompt, rng.randrange(0, 20))
        bench.ask(request_id, prompt, max_new_tokens=asked[request_id][1])
        for _ in range(rng.randrange(4)):
            bench.step()
        if rng.random() < 0.3:
            bench.leave(rng.randrange(request_id + 1))
    bench.run_until_idle()
    for request_id, (prompt, length) in asked.items():
        wanted = expected_output(prompt, min(length, 60 - len(prompt)), {0})
        if bench.finishes[request_id].kind == "abort":
            wanted = wanted[: len(bench.outputs[request_id])]
        assert bench.outputs[request_id] == wanted
    bench.assert_empty()


def test_answers_under_a_grammar_are_what_it_allows():
    """Some of them, in a memory so small that requests are retracted."""
    rng = random.Random(3)
    bench = Bench(num_pages=80, max_step_tokens=30, max_rows=6, conservativeness=0.0)
    wanted = {}
    for request_id in range(40):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20))]
        num, last = rng.randrange(1, 50), rng.choice([-1, 2, 7])
        if request_id % 3:
            bench.ask(request_id, prompt, num, matcher=FakeMatcher(last))
            wanted[request_id] = masked_output(prompt, num, last)
        else:
            bench.ask(request_id, prompt, num)
            wanted[request_id] = expected_output(prompt, num)
    bench.run_until_idle()
    assert bench.outputs == wanted
    assert bench.batcher.totals.num_retractions
    ends = [bench.finishes[i].kind for i in wanted if i % 3]
    assert {"stop", "length"} == set(ends)
    bench.assert_empty()


def test_a_step_under_a_grammar_is_planned_before_the_tokens_of_the_last_are_known():
    bench = Bench()
    bench.ask(1, [1, 2, 3], 5, matcher=FakeMatcher())
    bench.plan()
    first, second = bench.plans
    assert first.masked == second.masked == pack([0])
    masks = bench.batcher.due_masks()
    assert masks.step == first.step
    assert bench.batcher.due_masks() is None, "they depend on a token that is not there yet"
    bench.plans.popleft()
    bench.take(bench.batcher.commit(bench.worker.run(first, masks)))
    assert bench.batcher.due_masks().step == second.step


def test_answers_in_like_places_share_a_mask():
    bench = Bench()
    for number in range(3):
        bench.ask(number, [1, 2, number], 5, matcher=FakeMatcher())
    bench.plan()
    masks = bench.batcher.due_masks()
    which = unpack(masks.which)
    assert len(which) == len(unpack(bench.plans[0].masked))
    assert len(masks.words) == (max(which) + 1) * 4 * FakeMatcher().num_words


def test_a_token_that_the_grammar_forbids_ends_the_request_alone():
    bench = Bench()
    bench.ask(1, [1, 2, 3], 5, matcher=FakeMatcher())
    bench.ask(2, [4, 5], 5)
    wrong = {"first": True}

    def break_first(plan):
        if not wrong.pop("first", False):
            return None
        return StepResult(plan.step, pack([1, next(iter(expected_output([4, 5], 1)))]))

    bench.step(break_first)
    assert bench.finishes[1].kind == "abort"
    assert "token 1 is not allowed" in bench.finishes[1].message
    bench.run_until_idle()
    assert bench.outputs[2] == expected_output([4, 5], 5)


@pytest.mark.parametrize("ends_with_token", [False, True])
def test_a_grammar_that_meets_a_limit_ends_the_request_with_a_sentence(ends_with_token):
    """Not as if the answer were whole: where nothing else is allowed, an end is sampled."""
    bench = Bench()
    matcher = FakeMatcher()
    whole = masked_output([1, 2, 3], 3)
    stops = {"stop_token_ids": (whole[2],)} if ends_with_token else {}
    bench.ask(1, [1, 2, 3], 5, matcher=matcher, **stops)
    bench.ask(2, [4, 5], 5)
    while len(bench.outputs.get(1, [])) < 2:
        bench.step()
    matcher.error = "too many states"
    bench.run_until_idle()
    told = Finish("abort", message="the grammar cannot go on: too many states", status=400)
    assert bench.finishes[1] == told
    assert bench.outputs[2] == expected_output([4, 5], 5)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("page_size", [1, 4])
def test_each_prompt_gets_its_own_vector(page_size, depth):
    bench = Bench(page_size=page_size, depth=depth, gives_vectors=True, max_rows=3)
    prompts = [list(range(20)), [7], [*range(19), 1], list(range(40)), [7], [3, 4]]
    for number, prompt in enumerate(prompts):
        bench.embed(number, prompt)
    bench.run_until_idle()
    assert bench.vectors == {number: vector_of(prompt) for number, prompt in enumerate(prompts)}
    assert set(bench.finishes.values()) == {Finish("length", length=0)}
    assert bench.num_cached[3] >= 16, "its beginning was computed for the first one"
    assert bench.batcher.totals.num_output_tokens == 0


def test_vectors_of_different_namespaces_share_nothing():
    bench = Bench(gives_vectors=True)
    for namespace in ("a", "b", "a"):
        bench.embed(0, range(12), namespace)
        bench.run_until_idle()
        bench.finishes.clear()
    assert bench.num_cached[0] == 11
    assert bench.worker.num_tokens == 12 + 12 + 1


def test_a_prompt_may_fill_all_memory_and_no_more():
    bench = Bench(num_pages=16, gives_vectors=True)
    with pytest.raises(PromptTooLongError):
        bench.embed(0, range(17))
    bench.embed(1, range(16))
    bench.run_until_idle()
    assert bench.vectors == {1: vector_of(range(16))}


@pytest.mark.parametrize("is_cached", [True, False])
def test_vectors_under_pressure_while_clients_leave(is_cached):
    chance = random.Random(5)
    bench = Bench(
        num_pages=60, page_size=2, max_step_tokens=24, gives_vectors=True, is_cached=is_cached
    )
    prompts = {
        number: [chance.randrange(3) for _ in range(chance.randint(1, 100))]
        for number in range(300)
    }
    for number, prompt in prompts.items():
        bench.embed(number, prompt)
        if chance.random() < 0.5:
            bench.step()
        if chance.random() < 0.3:
            bench.leave(chance.randint(0, number))
    bench.run_until_idle()
    left = [number for number, finish in bench.finishes.items() if finish == LEFT]
    assert 30 < len(left) < 150
    for number, prompt in prompts.items():
        if bench.finishes[number] != LEFT:
            assert bench.vectors[number] == vector_of(prompt)
    assert bench.store.num_available == bench.store.num_pages


def test_a_vector_that_is_no_number_ends_its_request_only():
    bench = Bench(gives_vectors=True)
    bench.embed(1, [1, 2])
    bench.embed(2, [3])
    bench.step(lambda plan: StepResult(plan.step, b"", vectors=[b"", vector_of([3])]))
    assert (bench.finishes[1].kind, bench.finishes[1].status) == ("abort", 500)
    assert bench.vectors == {1: b"", 2: vector_of([3])}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("page_size", [1, 4])
def test_forced_tokens_are_taken_in_one_step(page_size, depth):
    rng = random.Random(depth)
    options = {"runs": 8}
    pool = {"num_pages": 64 // page_size, "page_size": page_size, "conservativeness": 0.1}
    bench = Bench(depth=depth, **pool)
    wanted = {}
    for request_id in range(24):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 14))]
        num, last = rng.randrange(1, 50), rng.choice([-1, 4, 2])
        bench.ask(request_id, prompt, num, matcher=FakeMatcher(last, **options))
        wanted[request_id] = masked_output(prompt, num, last, **options)
    bench.run_until_idle()
    assert bench.outputs == wanted
    totals = bench.batcher.totals
    assert totals.num_retractions
    assert totals.num_jumped_tokens > 24
    assert (totals.num_saved_passes < totals.num_jumped_tokens) == (depth == 2)
    assert {"stop", "length"} == {finish.kind for finish in bench.finishes.values()}
    bench.assert_empty()


def test_jumps_change_the_number_of_steps_and_not_the_answer():
    outputs, steps = [], []
    for jumps_forward in (False, True):
        bench = Bench(jumps_forward=jumps_forward)
        bench.ask(1, [1, 2, 3], 40, matcher=FakeMatcher(runs=4))
        bench.run_until_idle()
        outputs.append(bench.outputs[1])
        steps.append(bench.worker.num_steps)
        totals = bench.batcher.totals
    assert outputs[0] == outputs[1]
    assert steps[0] - steps[1] == totals.num_saved_passes > 10


@pytest.mark.parametrize("depth", [1, 2])
def test_what_every_answer_begins_with_is_computed_with_the_prompt(depth):
    opening = [9, 8, 7, 6]
    bench = Bench(depth=depth)
    bench.ask(1, [1, 2, 3], 8, matcher=FakeMatcher(opening=opening))
    bench.ask(2, [1, 2, 3], 3, matcher=FakeMatcher(opening=opening))
    bench.ask(3, [1, 2, 3], 8, matcher=FakeMatcher(opening=opening, last=6))
    bench.ask(4, [1, 2, 3], 8, matcher=FakeMatcher(opening=opening), stop_token_ids=(7,))
    bench.ask(5, [1, 2, 3], 0, matcher=FakeMatcher(opening=opening))
    bench.plan()
    assert bench.batcher.totals.num_jumped_tokens == 4 + 2 + 3 + 2 + 0
    bench.run_until_idle()
    assert bench.outputs[1] == masked_output([1, 2, 3], 8, opening=opening)
    assert bench.outputs[2] == opening[:3]
    assert bench.outputs[3] == opening
    assert bench.outputs[4] == opening[:3]
    assert bench.outputs[5] == []
    stop = Finish("stop")
    assert [bench.finishes[i] for i in (3, 4)] == [stop, Finish("stop", matched=7)]
    bench.assert_empty()


@pytest.mark.parametrize("num", [3, 4, 5])
def test_an_answer_that_ends_with_its_last_token_was_not_cut_off(num):
    bench = Bench()
    bench.ask(1, [1, 2, 3], num, matcher=FakeMatcher(opening=[9, 8, 7, 6], last=6))
    bench.run_until_idle()
    assert bench.finishes[1] == (Finish("stop") if num > 3 else Finish("length", length=3))


def test_a_request_with_logprobs_does_not_jump():
    bench = Bench()
    params = SamplingParams(max_new_tokens=20)
    message = Generate(1, pack([1, 2, 3]), params, logprobs=LogprobOptions())
    bench.outputs[1] = []
    bench.batcher.add(message, FakeMatcher(runs=4))
    bench.run_until_idle()
    assert bench.outputs[1] == masked_output([1, 2, 3], 20, runs=4)
    assert bench.batcher.totals.num_jumped_tokens == 0


def test_a_request_that_leaves_in_a_jump_leaves_nothing_behind():
    for num_steps in range(1, 14):
        bench = Bench()
        bench.ask(1, [1, 2, 3], 40, matcher=FakeMatcher(runs=4))
        for _ in range(num_steps):
            bench.step()
        bench.leave(1)
        bench.run_until_idle()
        bench.assert_empty()


def test_a_stop_token_that_is_forced_is_named_even_if_it_is_token_0():
    matcher = FakeMatcher(last=0, runs=23)
    message = Generate(1, pack([1]), SamplingParams(max_new_tokens=20, stop_token_ids=(0,)))
    options = {"arrival": 0, "seed": 0, "eos_ids": frozenset(), "max_total_len": 64}
    request = Request.from_message(message, matcher=matcher, **options)
    assert request.accept(24) is None
    jumped = jump_forward.jump(request)
    assert (jumped.num_tokens, jumped.finish) == (3, Finish("stop", matched=0))
    assert list(request.token_ids) == [1, 24, 44, 47, 0]
