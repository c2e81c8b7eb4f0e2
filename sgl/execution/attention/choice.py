"""Which attention back end runs where."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import TypeGuard

from sgl.errors import ConfigError
from sgl.execution.attention import AttentionBackend, RecordableBackend
from sgl.execution.attention.torch_attention import TorchAttention
from sgl.execution.kv_cache import KvCache
from sgl.models.batch import AttentionSpec

logger = logging.getLogger(__name__)


def make_backend(name: str, layers: list[AttentionSpec], cache: KvCache) -> AttentionBackend:
    """The back end called `name`; "auto" is the fastest one here.

    Raises ConfigError where `name` cannot run on this device or model.
    """
    on_cuda = cache.keys_SKE[0].device.type == "cuda"
    if name == "auto":
        name = "triton" if on_cuda else "torch"
    if name == "torch":
        return TorchAttention(layers, cache)
    if not on_cuda:
        raise ConfigError(f"--attention-backend {name} needs a GPU: use torch on the CPU")
    backend = _flashinfer(layers, cache) if name == "flashinfer" else None
    return backend or _triton(layers, cache)


def is_recordable(attention: AttentionBackend) -> TypeGuard[RecordableBackend]:
    """Whether steps can be recorded as CUDA graphs."""
    return hasattr(attention, "plan_recorded")


def _triton(layers: list[AttentionSpec], cache: KvCache) -> AttentionBackend:
    from sgl.execution.attention.triton_attention import TritonAttention

    return TritonAttention(layers, cache)


def _flashinfer(layers: list[AttentionSpec], cache: KvCache) -> AttentionBackend | None:
    """None, and a warning that says why, where flashinfer is missing or cannot be compiled."""
    from sgl.execution.attention.flashinfer_attention import FlashinferAttention
    from sgl.execution.attention.flashinfer_kernels import check_supported

    check_supported(layers, cache.model_dtype)
    _find_ninja()
    try:
        return FlashinferAttention(layers, cache, import_module("flashinfer"))
    except Exception as error:  # its compiler, linker and loader each fail in their own way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning(
            "flashinfer cannot be used (%s): attention runs on triton. It needs "
            '`pip install "sgl[cuda]"`, and nvcc of a CUDA toolkit to compile its kernels',
            reason,
        )
        return None


def _find_ninja() -> None:
    """The build tool is installed beside the interpreter, which need not be on the path."""
    if shutil.which("ninja") is None:
        folder = Path(sys.executable).parent
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
