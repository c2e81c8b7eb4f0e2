"""Whole steps of a small model on a device: tokens, log-probabilities, and that nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from step_bench import GREEDY, MAX_LEN, NUM_ROWS, Bench

from sgl.execution import logprobs, sampler
from sgl.execution.request_table import RequestTable
from sgl.execution.runner import Runner, StepOutput
from sgl.messages import Chunk, LogprobOptions, Logprobs, NewRow, pack, unpack
from sgl.sampling_params import SamplingParams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [50, 40, 30, 20, 10], [8] * 12]


@pytest.fixture(params=DEVICES)
def bench(request, tmp_path) -> Bench:
    return Bench(tmp_path / "model", request.param)


def test_decodes_and_prefills_of_one_step_give_what_each_alone_would(bench):
    outputs: list[list[int]] = [[] for _ in PROMPTS]

    def run(decodes, admitted=(), chunks=()):
        result = bench.step(decodes, admitted, chunks)
        rows = [*decodes, *(chunk.row for chunk in chunks if chunk.is_last)]
        for row, token_id in zip(rows, unpack(result.token_ids), strict=True):
            outputs[row].append(token_id)

    run([], [bench.new(0)], [bench.chunk(0, PROMPTS[0])])
    run([0], [bench.new(3), bench.new(1)],
        [bench.chunk(3, PROMPTS[3][:5], is_last=False), bench.chunk(1, PROMPTS[1])])  # fmt: skip
    run([], [], [bench.chunk(3, PROMPTS[3][5:9], is_last=False)])
    run([1, 0], [bench.new(2)], [bench.chunk(3, PROMPTS[3][9:]), bench.chunk(2, PROMPTS[2])])
    for _ in range(6):
        run([0, 1, 2, 3])
    for prompt, output_ids in zip(PROMPTS, outputs, strict=True):
        assert output_ids == bench.dense_greedy(prompt, len(output_ids))


def test_where_memory_is_short_prompts_go_one_by_one_and_the_largest_fails(bench, monkeypatch):
    bench.step([], [bench.new(0)], [bench.chunk(0, PROMPTS[0])])
    hidden = bench.runner.model.hidden

    def hidden_of_few(batch):
        if len(batch.token_ids_T) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return hidden(batch)

    monkeypatch.setattr(bench.runner.model, "hidden", hidden_of_few)
    result = bench.step(
        [0],
        [bench.new(1), bench.new(2), bench.new(3)],
        [bench.chunk(1, PROMPTS[1]), bench.chunk(3, PROMPTS[3]), bench.chunk(2, PROMPTS[2])],
    )
    decoded, second, failed, third = unpack(result.token_ids)
    assert list(unpack(result.failed)) == [2]
    assert "Tried to allocate 9 GiB" in result.error
    assert failed == -1
    assert decoded == bench.dense_greedy(PROMPTS[0], 2)[1]
    assert [second, third] == [bench.dense_greedy(PROMPTS[i], 1)[0] for i in (1, 2)]


def test_where_memory_is_short_after_tokens_are_drawn_the_step_is_not_made_again(
    bench, monkeypatch
):
    new = bench.new(0, logprobs=LogprobOptions(top_num=1))
    bench.step([], [new], [bench.chunk(0, PROMPTS[0])])

    def of_tokens(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(logprobs, "of_tokens", of_tokens)
    counted = bench.runner.table.last_token_R[0].item()
    with pytest.raises(torch.OutOfMemoryError, match="9 GiB"):
        bench.step([0], [bench.new(1)], [bench.chunk(1, PROMPTS[1])])
    drawn = bench.runner.table.last_token_R[0].item()
    assert [counted, drawn] == bench.dense_greedy(PROMPTS[0], 2), "once, and not twice"


def test_a_row_that_changes_hands_is_attended_to_anew(bench):
    """The next request's cached prompt is as long as the last one's was, plus the step's token."""
    old, other, prompt = [1, 2, 3, 4], [9, 8, 7, 6], [50, 40, 30, 20, 10, 5]
    bench.step([], [bench.new(2)], [bench.chunk(2, prompt[:5])])
    bench.step([], [bench.new(0), bench.new(1)], [bench.chunk(0, old), bench.chunk(1, other)])
    bench.step([1, 0])
    cached = pack((2 + 1) * MAX_LEN - 1 - index for index in range(5))
    bench.lens[0] = 5
    taken = NewRow(0, 5, cached, GREEDY, seed=0)
    result = bench.step([1], [taken], [Chunk(0, 5, pack(prompt[5:]), pack([3]), is_last=True)])
    assert unpack(result.token_ids)[1] == bench.dense_greedy(prompt, 1)[0]


def floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.float32)


def check_logprobs(found: Logprobs, wanted_KV: np.ndarray, next_ids: list[int]) -> None:
    """`found` has 3 top ids, and the ids 4 and 5 beside them."""
    num = len(next_ids)
    best = np.sort(wanted_KV, axis=1)[:, ::-1][:, :3]
    top_ids = np.array(unpack(found.top_ids)).reshape(num, 3)
    for ours, wanted in (
        (floats(found.values), wanted_KV[np.arange(num), next_ids]),
        (floats(found.top_values).reshape(num, 3), best),
        (np.take_along_axis(wanted_KV, top_ids, axis=1), best),
        (floats(found.chosen_values).reshape(num, 2), wanted_KV[:, [4, 5]]),
    ):
        np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_log_probabilities_are_those_of_the_model_whatever_is_sampled(bench):
    options = LogprobOptions(start_len=0, top_num=3, token_ids=pack([4, 5]))
    sampling = SamplingParams(temperature=1.0, logit_bias={17: 100.0})
    prompt = PROMPTS[0]
    asks = bench.new(1, sampling, logprobs=options)
    first = bench.chunk(1, prompt[:4], is_last=False, logprob_start=0, next_token_id=prompt[4])
    start = bench.step([], [bench.new(0), asks], [bench.chunk(0, PROMPTS[2]), first])
    end = bench.step([0], [], [bench.chunk(1, prompt[4:], logprob_start=4)])
    after = bench.step([0, 1])

    wanted_KV = bench.dense_logprobs([*prompt, 17])
    assert unpack(end.token_ids)[1] == unpack(after.token_ids)[1] == 17
    [begun], [ended], [decoded] = start.logprobs, end.logprobs, after.logprobs
    check_logprobs(begun.input, wanted_KV[:4], prompt[1:5])
    check_logprobs(ended.input, wanted_KV[4:6], prompt[5:])
    check_logprobs(ended.output, wanted_KV[6:7], [17])
    check_logprobs(decoded.output, wanted_KV[7:8], [17])
    assert [begun.index, ended.index, decoded.index] == [1, 1, 1]


def test_the_pages_on_the_device_are_those_of_the_host(bench):
    table = bench.runner.table
    bench.step([], [bench.new(4), bench.new(2)], [bench.chunk(4, [1, 2, 3]), bench.chunk(2, [4])])
    bench.step([2, 4])
    bench.step([2], [bench.new(4)], [bench.chunk(4, [5])])
    bench.step([4, 2])
    for row in range(NUM_ROWS):
        num_pages = int(table.num_pages_R[row])
        ours = table.device_pages_RP[row, :num_pages].tolist()
        assert ours == table.pages_RP[row, :num_pages].tolist()
    assert table.num_pages_R.tolist() == [0, 0, 4, 0, 2, 0]


@contextmanager
def waits_are_errors(device: str) -> Iterator[None]:
    """Nobody can read a number of a meta tensor; a GPU must be told to forbid it."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def replace_what_needs_data(monkeypatch) -> None:
    """Copies to a device without data, and from it; and what is a kernel on every real one."""
    monkeypatch.setattr(sampler, "apply_penalties", lambda *_: None)
    monkeypatch.setattr(sampler, "count_tokens", lambda *_: None)
    monkeypatch.setattr(sampler, "sample_tokens", lambda logits, *_: logits.argmax(dim=-1))
    monkeypatch.setattr(RequestTable, "to_device", lambda _, array: torch.tensor(array).to("meta"))
    monkeypatch.setattr(
        Runner, "_output", lambda _, step, ids, rows: StepOutput(step, torch.zeros(len(ids)), rows)
    )


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 0.0, "presence_penalty": 1.0, "repetition_penalty": 1.2},
        {"temperature": 0.0, "min_new_tokens": 9},
        {"temperature": 0.0, "logit_bias": {3: 1.0}},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_no_step_waits_for_the_device(fields, device, tmp_path, monkeypatch):
    if device == "meta":
        replace_what_needs_data(monkeypatch)
    bench = Bench(tmp_path / "model", device)
    sampling = SamplingParams(**fields)

    def run_request() -> None:
        admitted = [bench.new(0, sampling), bench.new(1)]
        whole, part = bench.chunk(0, [1, 2, 3]), bench.chunk(1, [1, 2, 3, 4], is_last=False)
        bench.step([], admitted, [whole, part])
        bench.step([0], [], [bench.chunk(1, [5, 6])])
        bench.step([0, 1])

    run_request()  # kernels and libraries are loaded at their first use
    with waits_are_errors(device):
        run_request()
