"""Recorded steps: with prompts and without, filled up, behind a shared prefix; and which steps are.

Without a GPU the same step is run anew in place of a replay, from the same memory.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from step_bench import GREEDY, NUM_ROWS, Bench

from sgl.execution.attention import prefix_blocks, triton_attention
from sgl.execution.attention.shared_prefix import find_clusters
from sgl.execution.attention.triton_attention import TritonAttention
from sgl.execution.recorded_inputs import GraphShape, RecordedInputs
from sgl.execution.step_graphs import Recording, StepGraphs, max_outputs, recorded_shapes
from sgl.execution.step_layout import StepLayout
from sgl.messages import LogprobOptions, NewRow, unpack
from sgl.sampling_params import SamplingParams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SYSTEM = [7, 6, 5, 4, 3, 2, 1, 2, 3, 4]


class Rerun:
    """Stands for a graph where there are none: computes the step, leaves it where a graph would."""

    def __init__(self, graphs: StepGraphs, shape: GraphShape, variant: int) -> None:
        self.step = lambda: graphs.step(shape, variant)
        self.results = self.step()

    def replay(self) -> None:
        for target, found in zip(self.results, self.step(), strict=True):
            target.copy_(found)


def record(graphs: StepGraphs) -> None:
    if graphs.table.device.type == "cuda":
        graphs.record()
        return
    for shape in graphs.inputs:
        for variant in range(graphs.attention.num_variants(shape)):
            rerun = Rerun(graphs, shape, variant)
            graphs.recordings[shape, variant] = Recording(rerun, *rerun.results)


@pytest.fixture(params=DEVICES)
def bench(request, tmp_path, monkeypatch) -> Bench:
    monkeypatch.setattr(triton_attention, "MIN_SHARING", 3)
    monkeypatch.setattr(triton_attention, "MAX_SHORT_RUNS", 4)  # an interpreter runs the programs
    monkeypatch.setattr(prefix_blocks, "find_clusters", partial(find_clusters, min_saved=10))
    bench = Bench(tmp_path / "model", request.param, TritonAttention)
    runner = bench.runner
    shapes = [GraphShape(size, size) for size in (2, NUM_ROWS)]
    shapes += recorded_shapes(runner.attention, 0, 16)
    runner.graphs = StepGraphs(runner.model, runner.table, runner.attention, runner.tp, shapes)
    with torch.inference_mode():
        record(runner.graphs)
    bench.launched = watch(runner.graphs, monkeypatch)
    return bench


def watch(graphs: StepGraphs, monkeypatch) -> list[tuple[GraphShape, int] | None]:
    """What each step is launched as."""
    launched: list[tuple[GraphShape, int] | None] = []
    launch, choose = graphs.launch, graphs.attention.choose_variant

    def launch_noted(*inputs):
        launched.append(None)
        return launch(*inputs)

    def choose_noted(layout, table, shape):
        variant = choose(layout, table, shape)
        launched[-1] = shape, variant
        return variant

    monkeypatch.setattr(graphs, "launch", launch_noted)
    monkeypatch.setattr(graphs.attention, "choose_variant", choose_noted)
    return launched


def test_recorded_steps_with_prompts_give_what_each_request_alone_would(bench):
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [50, 40, 30, 20, 10], [8] * 12]
    outputs: list[list[int]] = [[] for _ in prompts]

    def run(decodes, admitted=(), chunks=()):
        result = bench.step(decodes, admitted, chunks)
        rows = [*decodes, *(chunk.row for chunk in chunks if chunk.is_last)]
        for row, token_id in zip(rows, unpack(result.token_ids), strict=True):
            outputs[row].append(token_id)

    run([], [bench.new(0)], [bench.chunk(0, prompts[0])])
    run([0], [bench.new(3), bench.new(1)],
        [bench.chunk(3, prompts[3][:5], is_last=False), bench.chunk(1, prompts[1])])  # fmt: skip
    run([], [], [bench.chunk(3, prompts[3][5:9], is_last=False)])
    run([1, 0], [bench.new(2)], [bench.chunk(3, prompts[3][9:]), bench.chunk(2, prompts[2])])
    for _ in range(6):
        run([0, 1, 2, 3])
    for prompt, output_ids in zip(prompts, outputs, strict=True):
        assert output_ids == bench.dense_greedy(prompt, len(output_ids))
    shapes = [launched[0] for launched in bench.launched]
    assert [shape.has_prompts for shape in shapes] == [True] * 4 + [False] * 6


def test_a_prompt_comes_beside_streams_that_share_their_first_tokens(bench):
    bench.step([], [bench.new(0)], [bench.chunk(0, [*SYSTEM, 20])])
    prefix = bench.runner.table.pages_RP[0, : len(SYSTEM)].copy()
    admitted, chunks = [], []
    for row in (1, 2, 3):
        admitted.append(NewRow(row, len(SYSTEM), prefix.tobytes(), GREEDY, seed=row))
        bench.lens[row] = len(SYSTEM)
        chunks.append(bench.chunk(row, [20 + row]))
    firsts = unpack(bench.step([0], admitted, chunks).token_ids)
    other = [60, 61, 62]
    mixed = bench.step([0, 1, 2, 3], [bench.new(4)], [bench.chunk(4, other)])
    shape, variant = bench.launched[-1]
    assert (shape.has_prompts, variant) == (True, 1)
    *seconds, last = unpack(mixed.token_ids)
    for row in (1, 2, 3):
        wanted = bench.dense_greedy([*SYSTEM, 20 + row], 2)
        assert [firsts[row], seconds[row]] == wanted
    assert last == bench.dense_greedy(other, 1)[0]


def test_sampling_and_log_probabilities_work_on_recorded_logits(bench):
    forced = SamplingParams(temperature=1.0, logit_bias={17: 100.0})
    options = LogprobOptions(start_len=2, top_num=1)
    prompt = [9, 8]
    asks = bench.new(1, forced, logprobs=options)
    result = bench.step([], [bench.new(0), asks], [bench.chunk(0, [5, 6]), bench.chunk(1, prompt)])
    assert bench.launched[-1] is not None
    greedy, biased = unpack(result.token_ids)
    assert greedy == bench.dense_greedy([5, 6], 1)[0]
    assert biased == 17
    [row] = result.logprobs
    value = np.frombuffer(row.output.values, np.float32)[0]
    assert value == pytest.approx(bench.dense_logprobs(prompt)[-1, 17], abs=1e-4)


def test_what_does_not_fit_runs_unrecorded(bench, monkeypatch):
    graphs = bench.runner.graphs
    small = min(shape for shape in graphs.inputs if shape.has_prompts)
    for shape in list(graphs.inputs):
        if shape.has_prompts:
            del graphs.inputs[shape]
    tight = GraphShape(12, 2, small.num_plan_rows)
    graphs.inputs[tight] = RecordedInputs(tight, graphs.table, 0)
    layouts = {
        "too many tokens": ([13], 1),
        "too many outputs": ([1, 1, 2], 3),
        "too many runs": ([2] * (small.num_plan_rows + 1), 1),
    }
    for lens, num_sampled in layouts.values():
        lens_B = np.array(lens)
        rows_B = np.zeros(len(lens), np.int64)
        layout = StepLayout(rows_B, lens_B, lens_B, num_decodes=0)
        runs = np.zeros((len(lens), 8), np.int32)
        assert graphs._smallest(layout, num_sampled, runs) is None
    one_run = np.zeros((1, 8), np.int32)
    fits = StepLayout(np.zeros(1, np.int64), np.array([12]), np.array([12]), 0)
    assert graphs._smallest(fits, 1, one_run) == tight
    roomy = GraphShape(512, 512, small.num_plan_rows)
    graphs.inputs[roomy] = RecordedInputs(roomy, graphs.table, 0)
    for num_tokens, shape in ((380, None), (390, roomy)):
        lens_B = np.array([num_tokens])
        layout = StepLayout(np.zeros(1, np.int64), lens_B, lens_B, 0)
        found = graphs._smallest(layout, 1, one_run)
        assert found == shape, num_tokens
    prompt_logprobs = LogprobOptions(start_len=0, top_num=1)
    asks = bench.new(0, logprobs=prompt_logprobs)
    bench.step([], [asks], [bench.chunk(0, [1, 2, 3], logprob_start=0)])
    assert not bench.launched


@pytest.mark.parametrize("max_tokens", [0, 1, 64, 65, 1000, 2048])
def test_shapes_hold_any_step_up_to_the_largest(max_tokens):
    class Backend:
        def max_plan_rows(self, num_tokens):
            return num_tokens

    shapes = recorded_shapes(Backend(), 0, max_tokens)
    sizes = [shape.num_tokens for shape in shapes]
    assert sizes == sorted(set(sizes))
    assert sizes[-1:] == ([max_tokens] if max_tokens else [])
    assert all(shape.num_outputs == max_outputs(shape.num_tokens) for shape in shapes)
    for smaller, larger in pairwise(sizes):
        assert larger - smaller <= max(64, larger / 8)
