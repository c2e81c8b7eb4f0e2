"""A runner of a small model, plans for it, and what must come out of them."""

from __future__ import annotations

import numpy as np
import tiny_models
import torch

from sgl.execution.attention.torch_attention import TorchAttention
from sgl.execution.kv_cache import KvCache
from sgl.execution.request_table import RequestTable
from sgl.execution.runner import Runner
from sgl.kernels.collectives import TensorParallel
from sgl.messages import Chunk, NewRow, StepPlan, StepResult, pack
from sgl.sampling_params import SamplingParams

NUM_ROWS, MAX_LEN, VOCAB = 6, 64, 101
GREEDY = SamplingParams(temperature=0.0)


class Bench:
    """A runner, and plans for it; row r has the pages r * MAX_LEN …, in reverse."""

    def __init__(self, folder, device, make_attention=TorchAttention) -> None:
        tiny_models.write_checkpoint(folder)
        self.dense_model = tiny_models.loaded(folder)
        model = tiny_models.loaded(folder, device=torch.device(device))
        cache = KvCache(
            model.attention_layers,
            NUM_ROWS * MAX_LEN,
            1,
            dtype=torch.float32,
            device=torch.device(device),
        )
        table = RequestTable(NUM_ROWS, MAX_LEN, VOCAB, torch.device(device))
        attention = make_attention(model.attention_layers, cache)
        self.runner = Runner(model, table, attention, TensorParallel())
        self.lens = [0] * NUM_ROWS
        self.num_steps = 0

    def new(self, row: int, sampling: SamplingParams = GREEDY, **fields: object) -> NewRow:
        self.lens[row] = 0
        return NewRow(row, 0, b"", sampling, seed=row, eos_ids=pack([0]), **fields)

    def chunk(self, row: int, ids: list[int], *, is_last: bool = True, **fields: object) -> Chunk:
        start = self.lens[row]
        pages = pack(self._page(row) for _ in ids)
        return Chunk(row, start, pack(ids), pages, is_last, **fields)

    def step(self, decodes=(), admitted=(), chunks=()) -> StepResult:
        pages = pack(self._page(row) for row in decodes)
        plan = StepPlan(
            self.num_steps,
            admitted=list(admitted),
            decode_rows=pack(decodes),
            page_ids=pages,
            chunks=list(chunks),
        )
        self.num_steps += 1
        return self.runner.run(plan).wait()

    def _page(self, row: int) -> int:
        self.lens[row] += 1
        return (row + 1) * MAX_LEN - self.lens[row]

    def dense_logprobs(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities after each of `ids`, without a cache, on the CPU."""
        logits = tiny_models.sequence_logits(self.dense_model, ids)
        return torch.log_softmax(logits.double(), dim=-1).numpy()

    def dense_greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        ids = list(prompt)
        for _ in range(num_tokens):
            ids.append(int(self.dense_logprobs(ids)[-1].argmax()))
        return ids[len(prompt) :]
