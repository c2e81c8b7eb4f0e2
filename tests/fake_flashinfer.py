"""A stand-in for the module `flashinfer`: its calls, computed with torch from what it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl.kernels.attention import attention_reference


class FakeFlashinfer:
    """`plans` lists the calls that planned: which wrapper, and the host's numbers."""

    def __init__(self) -> None:
        self.plans: list[tuple[str, list[int], list[int]]] = []

    def BatchPrefillWithPagedKVCacheWrapper(self, *arguments):  # noqa: N802
        return PrefillWrapper(self, *arguments)

    def BatchDecodeWithPagedKVCacheWrapper(self, *arguments, **options):  # noqa: N802
        return DecodeWrapper(self, *arguments, **options)

    def fast_decode_plan(self, wrapper, indptr, indices, last_page_len, *shape, **options):
        assert wrapper.buffers, "without fixed buffers this would take the host's tensors"
        assert len(indices) <= len(wrapper.buffers[1])
        wrapper.keep("replay", indptr, wrapper.buffers[1], last_page_len, shape, options)


class _Wrapper:
    def __init__(self, library, float_workspace_buffer, kv_layout) -> None:
        assert kv_layout == "NHD"
        assert float_workspace_buffer.dtype == torch.uint8
        self.library = library

    def keep(self, kind, indptr, indices, last_page_len, shape, options) -> None:
        for numbers in (indptr, indices, last_page_len):
            assert numbers.dtype == torch.int32
        assert indptr.device.type == last_page_len.device.type == "cpu"
        self.indptr, self.indices, self.last_lens = indptr, indices, last_page_len
        self.num_heads, self.num_kv_heads, self.head_dim, self.page_size = shape
        self.options = options
        self.library.plans.append((kind, indptr.tolist(), last_page_len.tolist()))

    def attend(self, q: Tensor, paged, query_indptr: list[int], out: Tensor) -> None:
        assert q.dtype == self.options["q_data_type"]
        assert q.shape == out.shape == (query_indptr[-1], self.num_heads, self.head_dim)
        for x in paged:
            assert x.dtype == self.options["kv_data_type"]
            assert x.shape[1:] == (self.page_size, self.num_kv_heads, self.head_dim)
        for b, last_len in enumerate(self.last_lens.tolist()):
            mine = self.indices[self.indptr[b] : self.indptr[b + 1]].long()
            length = (len(mine) - 1) * self.page_size + last_len
            keys, values = (x[mine].flatten(0, 1)[:length] for x in paged)
            begin, end = query_indptr[b : b + 2]
            out[begin:end] = self._attend_one(q[begin:end], keys, values)

    def _attend_one(self, q_QHE: Tensor, keys_LKE: Tensor, values_LKE: Tensor) -> Tensor:
        length, group_size = len(keys_LKE), self.num_heads // self.num_kv_heads
        key = torch.arange(length)
        last_seen = torch.arange(length - len(q_QHE), length).unsqueeze(1)
        is_hidden = key > last_seen
        if self.options["window_left"] >= 0:
            is_hidden |= key < last_seen - self.options["window_left"]
        mask = torch.zeros(is_hidden.shape).masked_fill(is_hidden, -torch.inf)
        q, k, v = (
            x.transpose(0, 1).unsqueeze(0)
            for x in (q_QHE, *(x.repeat_interleave(group_size, 1) for x in (keys_LKE, values_LKE)))
        )
        scale, soft_cap = self.options["sm_scale"], self.options["logits_soft_cap"]
        return attention_reference(q, k, v, mask, scale, soft_cap)[0][0].transpose(0, 1)


class PrefillWrapper(_Wrapper):
    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
             num_qo_heads, num_kv_heads, head_dim_qk, page_size, *, causal,
             **options) -> None:  # fmt: skip
        assert causal
        assert qo_indptr.dtype == torch.int32
        self.query_indptr = qo_indptr.tolist()
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.keep(
            "prefill", paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, shape, options
        )

    def run(self, q, paged_kv_cache, *, out) -> None:
        self.attend(q, paged_kv_cache, self.query_indptr, out)


class DecodeWrapper(_Wrapper):
    def __init__(self, library, float_workspace_buffer, kv_layout, *, use_tensor_cores,
                 use_cuda_graph=False, paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None,
                 paged_kv_last_page_len_buffer=None) -> None:  # fmt: skip
        super().__init__(library, float_workspace_buffer, kv_layout)
        assert use_tensor_cores
        self.buffers: tuple[Tensor, Tensor, Tensor] | None = None
        if use_cuda_graph:
            assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
            self.buffers = (
                paged_kv_indptr_buffer,
                paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer,
            )

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer) -> None:
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
             **options) -> None:  # fmt: skip
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self.keep("decode", indptr, indices, last_page_len, shape, options)
        if self.buffers:
            self.indices = self.buffers[1]

    def run(self, q, paged_kv_cache, *, out) -> None:
        if self.buffers:  # the plan and what the graph lists must go together
            assert self.buffers[0].tolist() == self.indptr.tolist()
            assert self.buffers[2].tolist() == self.last_lens.tolist()
        self.attend(q, paged_kv_cache, list(range(len(self.last_lens) + 1)), out)
