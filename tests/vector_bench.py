"""Batcher and runner of a small model that gives vectors, in one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgl.execution.attention.torch_attention import TorchAttention
from sgl.execution.kv_cache import KvCache
from sgl.execution.request_table import RequestTable
from sgl.execution.runner import Runner, StepOutput
from sgl.kernels.collectives import TensorParallel
from sgl.messages import Embed, Finish, pack
from sgl.models.loader import load_model
from sgl.scheduling.batcher import Batcher
from sgl.scheduling.kv_store import KvStore
from sgl.scheduling.limits import Limits

CPU = torch.device("cpu")
NUM_TOKENS, NUM_ROWS = 512, 4
DONE = Finish("length", length=0)


class VectorBench:
    """Steps overlap as they do between processes: the next one is planned before a result is in."""

    def __init__(
        self,
        folder: Path,
        *,
        is_embedding: bool = False,
        make_attention: Any = TorchAttention,
        page_size: int = 1,
        max_step_tokens: int = 256,
        is_cached: bool = True,
        device: torch.device = CPU,
    ) -> None:
        self.model, self.config = load_model(
            folder, dtype="float32", device=device, tp=TensorParallel(), is_embedding=is_embedding
        )
        num_pages = NUM_TOKENS // page_size
        formats = {"dtype": torch.float32, "model_dtype": torch.float32, "device": device}
        cache = KvCache(self.model.attention_layers, num_pages, page_size, **formats)
        table = RequestTable(NUM_ROWS, num_pages, self.config.vocab_size, device)
        attention = make_attention(self.model.attention_layers, cache)
        self.runner = Runner(self.model, table, attention, TensorParallel())
        self.runner.warm_up(20)
        self.batcher = Batcher(
            KvStore(num_pages, page_size, is_cached=is_cached),
            Limits(max_step_tokens=max_step_tokens, max_rows=NUM_ROWS, max_total_len=NUM_TOKENS),
        )
        self.num_asked = 0
        self.num_cached: dict[int, int] = {}

    def vectors(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """All at once: a row for each prompt."""
        first = self.num_asked
        for number, prompt in enumerate(prompts, start=first):
            self.batcher.add(Embed(number, pack(prompt)))
        self.num_asked += len(prompts)
        found = self._run()
        assert sorted(found) == list(range(first, self.num_asked))
        return np.stack([found[number] for number in sorted(found)])

    def _run(self) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        outputs: deque[StepOutput] = deque()
        while True:
            while plan := self.batcher.plan():
                outputs.append(self.runner.run(plan))
            if not outputs:
                return found
            for delta in self.batcher.commit(outputs.popleft().wait()):
                assert (delta.token_ids, delta.finish) == (b"", DONE)
                found[delta.request_id] = np.frombuffer(delta.vector, np.float32)
                self.num_cached[delta.request_id] = delta.num_cached
            self.batcher.check()
