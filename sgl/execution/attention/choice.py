"""Which attention back end runs where."""

from __future__ import annotations

from typing import TypeGuard

from sgl.errors import ConfigError
from sgl.execution.attention import AttentionBackend, RecordableBackend
from sgl.execution.attention.torch_attention import TorchAttention
from sgl.execution.kv_cache import KvCache
from sgl.models.batch import AttentionSpec


def make_backend(name: str, layers: list[AttentionSpec], cache: KvCache) -> AttentionBackend:
    """The back end called `name`; "auto" is the fastest one here."""
    on_cuda = cache.keys_SKE[0].device.type == "cuda"
    if name == "auto":
        name = "triton" if on_cuda else "torch"
    if name == "torch":
        return TorchAttention(layers, cache)
    if not on_cuda:
        raise ConfigError(f"--attention-backend {name} needs a GPU: use torch on the CPU")
    from sgl.execution.attention.triton_attention import TritonAttention

    return TritonAttention(layers, cache)


def is_recordable(attention: AttentionBackend) -> TypeGuard[RecordableBackend]:
    """Whether decode steps can be recorded as CUDA graphs."""
    return hasattr(attention, "plan_decode")
