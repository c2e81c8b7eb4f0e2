"""flashinfer's wrappers for the layers that are alike: one plan of a step serves them all.

A plan cuts a step into pieces of work for the multiprocessors. flashinfer makes it on the host, in
pinned memory of the wrapper, and copies it to the device. Of a wrapper for recorded steps the plan
changes and the launch does not: its grid is that of the most pieces there may be, and what there
is to do is read from the plan.

Axes: B requests
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgl.errors import ConfigError
from sgl.execution.kv_cache import KvCache
from sgl.kernels.page_lists import PageLists
from sgl.models.batch import AttentionSpec

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)  # its tensor-core kernels load 64 numbers at a time, and no rest
USUAL_WORKSPACE_BYTES = 128 * 2**20
PLAN_BYTES = 2**20  # a graph of 1000 requests needs 40 KiB


class HostPages(NamedTuple):
    """How many pages the requests of a step have, known to the host: int32.

    indptr_B      where each request's pages begin in the list of all, and where the last ends
    last_lens_B   tokens in the last page of each
    """

    indptr_B: Tensor
    last_lens_B: Tensor

    @classmethod
    def of(cls, kv_lens_B: np.ndarray, page_size: int, device: torch.device) -> HostPages:
        """Those of B requests, to be copied to `device`."""
        last_lens_B = (kv_lens_B - 1) % page_size + 1
        indptr_B = offsets(num_pages(kv_lens_B, page_size), device)
        return cls(indptr_B, on_host(last_lens_B, device))

    @property
    def total(self) -> int:
        return int(self.indptr_B[-1])


def num_pages(kv_lens_B: np.ndarray, page_size: int) -> np.ndarray:
    return -(-kv_lens_B // page_size)


def offsets(lens_B: np.ndarray, device: torch.device) -> Tensor:
    """Where each of B runs begins when they lie end to end, and where the last ends."""
    return on_host(np.concatenate([[0], np.cumsum(lens_B)]), device)


def on_host(array: np.ndarray, device: torch.device) -> Tensor:
    """An int32 host tensor that can be copied to `device` without a wait."""
    tensor = torch.from_numpy(array.astype(np.int32))
    return tensor if device.type == "cpu" else tensor.pin_memory()


class Wrapper:
    """One of flashinfer's wrappers, planned anew only when its last plan is on the device."""

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        self.wrapper = wrapper
        self.device = device
        self.copied: torch.cuda.Event | None = None

    def plan(self, plan: Callable[..., None], *arguments: object, **options: object) -> None:
        """Call `plan`, which writes where the copy of the plan before reads."""
        if self.copied is not None:
            self.copied.synchronize()  # it has, unless the device is a whole step behind
        plan(*arguments, **options)
        if self.device.type == "cuda":
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record()

    def run(self, q_THE: Tensor, paged: tuple[Tensor, Tensor], out_THE: Tensor) -> None:
        self.wrapper.run(q_THE, paged, out=out_THE)


class LayerKernels:
    """The wrappers for layers of one spec: for chunks, for decodes, and one for each graph."""

    def __init__(
        self,
        library: ModuleType,
        spec: AttentionSpec,
        cache: KvCache,
        workspace: Tensor,
    ) -> None:
        self.library = library
        self.device = workspace.device
        self.page_size = cache.page_size
        self.shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, cache.page_size)
        self.options = {
            "window_left": -1 if spec.window is None else spec.window - 1,
            "logits_soft_cap": spec.soft_cap,
            "sm_scale": spec.scale,
            "q_data_type": cache.model_dtype,
            "kv_data_type": cache.keys_SKE[0].dtype,
        }
        self.prefill = self._wrap(library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD"))
        self.unrecorded = self._wrap(
            library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        )
        self.recorded: dict[int, Wrapper] = {}  # by batch size
        self.decode = self.unrecorded  # the one that the next `run` uses
        self.plan_buffer = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=self.device)

    def plan_prefill(self, query_indptr_B: Tensor, pages: HostPages, indices_N: Tensor) -> None:
        """`query_indptr_B` tells the requests' queries apart; all of them are on the host."""
        self.prefill.plan(
            self.prefill.wrapper.plan,
            query_indptr_B,
            pages.indptr_B,
            indices_N,
            pages.last_lens_B,
            *self.shape,
            causal=True,
            **self.options,
        )

    def plan_decode(self, pages: HostPages, indices_N: Tensor) -> None:
        self.decode = self.unrecorded
        self.decode.plan(
            self.decode.wrapper.plan,
            pages.indptr_B,
            indices_N,
            pages.last_lens_B,
            *self.shape,
            **self.options,
        )

    def add_recorded(self, lists: PageLists, workspace: Tensor) -> None:
        """The wrapper for steps of one batch size, which reads pages where `lists` are written.

        A step is planned before the next one is run, so all sizes share one buffer for plans.
        """
        size = len(lists.last_lens_B)
        wrapper = self.library.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=lists.indptr_B,
            paged_kv_indices_buffer=lists.indices_N,
            paged_kv_last_page_len_buffer=lists.last_lens_B,
        )
        wrapper.reset_workspace_buffer(workspace, self.plan_buffer)
        pages = HostPages.of(np.ones(size, np.int64), self.page_size, self.device)
        arguments = (pages.indptr_B, lists.indices_N[:size], pages.last_lens_B)
        self.recorded[size] = self._wrap(wrapper)
        self.recorded[size].plan(wrapper.plan, *arguments, *self.shape, **self.options)

    def plan_recorded(self, pages: HostPages, indices_N: Tensor) -> None:
        """Before a replay. What lists the pages on the device is part of the graph."""
        wrapper = self.recorded[len(pages.last_lens_B)]
        # `plan` itself looks at each length in Python: 3 ms for 1000 of them
        wrapper.plan(
            self.library.fast_decode_plan,
            wrapper.wrapper,
            pages.indptr_B,
            indices_N[: pages.total],
            pages.last_lens_B,
            *self.shape,
            **self.options,
        )

    def _wrap(self, wrapper: Any) -> Wrapper:
        return Wrapper(wrapper, self.device)


def check_supported(layers: Sequence[AttentionSpec], dtype: torch.dtype) -> None:
    """Raises ConfigError for a model that flashinfer has no kernels for."""
    head_dims = {spec.head_dim for spec in layers}
    if dtype not in DTYPES:
        lack = f"the dtype {str(dtype).removeprefix('torch.')}"
    elif unknown := sorted(head_dims - set(HEAD_DIMS)):
        lack = f"heads of size {unknown[0]}"
    else:
        return
    raise ConfigError(f"--attention-backend flashinfer has no kernels for {lack}: use triton")


def unrecorded_workspace_bytes(spec: AttentionSpec, num_cores: int) -> int:
    """What parts of a step leave for their merge: as many parts as run at a time, or none."""
    num_parts = 2 * num_cores // spec.num_kv_heads
    return max(USUAL_WORKSPACE_BYTES, _parts_bytes(spec, num_parts, 128))


def recorded_workspace_bytes(spec: AttentionSpec, num_cores: int, size: int) -> int:
    """The same for a graph, which has room for the most parts that `size` decodes may have."""
    group_size = spec.num_heads // spec.num_kv_heads
    tile = next(tile for tile in (16, 64, 128) if group_size <= tile or tile == 128)
    num_tiles = -(-size * group_size // tile) + size - 1
    return _parts_bytes(spec, max(num_tiles, 2 * num_cores // spec.num_kv_heads), tile)


def _parts_bytes(spec: AttentionSpec, num_parts: int, tile: int) -> int:
    """float32 outputs and sums of exponentials of a tile of query rows for each head and part."""
    return spec.num_heads * num_parts * tile * (spec.head_dim + 1) * 4 + 2**20
