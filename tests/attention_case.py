"""A step of attention over random KV, and what must come out of it."""

from __future__ import annotations

import numpy as np
import torch

from sgl.execution.kv_cache import KvCache
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import StepLayout
from sgl.kernels.attention import attention_reference
from sgl.models.batch import AttentionSpec

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Case:
    """Requests with random KV in shuffled pages; `shared` of their first tokens are the same."""

    def __init__(self, kv_lens, query_lens, *, page_size=1, shared=0, spec=None, dtype, device):
        self.spec = spec or AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=16, scale=0.25)
        self.device = torch.device(device)
        rng = np.random.default_rng(0)
        num_pages = sum(-(-length // page_size) for length in kv_lens) + 3
        self.cache = KvCache([self.spec], num_pages, page_size, dtype=dtype, device=self.device)
        self.table = RequestTable(len(kv_lens) + 2, max(kv_lens) + 1, 11, self.device)
        self.rows = rng.permutation(len(kv_lens) + 2)[: len(kv_lens)]
        self.keys, self.values = [], []
        pages = list(rng.permutation(num_pages))
        for row, length in zip(self.rows, kv_lens, strict=True):
            self._add_request(row, length, pages, page_size, shared, dtype)
        num_tokens = sum(query_lens)
        num_decodes = next((i for i, num in enumerate(query_lens) if num > 1), len(query_lens))
        self.layout = StepLayout(
            self.rows.astype(np.int64), np.array(query_lens), np.array(kv_lens), num_decodes
        )
        shape = (num_tokens, self.spec.num_heads, self.spec.head_dim)
        self.q = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        self.q = self.q.to(self.device, dtype)

    def _add_request(self, row, length, pages, page_size, shared, dtype):
        count = -(-length // page_size)
        first = self.table.pages_RP[self.rows[0], : shared // page_size] if self.keys else []
        mine = [*first, *(pages.pop() for _ in range(count - len(first)))]
        self.table._append_pages(row, np.array(mine, np.int32))
        self.table.device_pages_RP[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        shape = (length, self.spec.num_kv_heads, self.spec.head_dim)
        generator = torch.Generator().manual_seed(int(row))
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        if self.keys:
            keys[:shared], values[:shared] = self.keys[0][:shared], self.values[0][:shared]
        self.keys.append(keys)
        self.values.append(values)
        slots = torch.tensor(
            [mine[p // page_size] * page_size + p % page_size for p in range(length)]
        )
        self.cache.keys_SKE[0][slots.to(self.device)] = keys.to(self.device, dtype)
        self.cache.values_SKE[0][slots.to(self.device)] = values.to(self.device, dtype)

    def run(self, make_backend):
        backend = make_backend([self.spec], self.cache)
        backend.plan(self.layout, self.table, self.inputs())
        return backend, backend.run(0, self.q).float().cpu()

    def inputs(self):
        """Rows and positions of the step's tokens; nothing reads their slots and ids here."""
        inputs_4T = np.zeros((4, len(self.q)), np.int32)
        inputs_4T[0] = np.repeat(self.rows, self.layout.query_lens_B)
        inputs_4T[1] = self.layout.positions()
        return self.table.to_device(inputs_4T)

    def expected(self):
        outputs, begin = [], 0
        group = self.spec.num_heads // self.spec.num_kv_heads
        dtype = self.q.dtype
        for index, length in enumerate(self.layout.kv_lens_B):
            num_queries = self.layout.query_lens_B[index]
            q = self.q[begin : begin + num_queries].cpu().transpose(0, 1).unsqueeze(0)
            begin += num_queries
            k, v = (
                x[index].to(dtype).repeat_interleave(group, dim=1).transpose(0, 1).unsqueeze(0)
                for x in (self.keys, self.values)
            )
            seen = torch.arange(length - num_queries, length).unsqueeze(1)
            keys = torch.arange(length)
            hidden = keys > seen
            if self.spec.window:
                hidden |= keys <= seen - self.spec.window
            mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
            o, _ = attention_reference(q, k, v, mask, self.spec.scale, self.spec.soft_cap)
            outputs.append(o[0].transpose(0, 1).float())
        return torch.cat(outputs)

    def check(self, make_backend):
        backend, output = self.run(make_backend)
        error = (output - self.expected()).abs().max().item()
        assert error <= TOLERANCE[self.q.dtype]
        return backend
