"""The backend of programs that name none, and settings of all programs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from sgl.lang.backends.base import Backend
from sgl.lang.loop import loop_thread


@dataclass
class GlobalConfig:
    """
    default_backend  of programs that name none
    """

    default_backend: Backend | None = None


global_config = GlobalConfig()


def set_default_backend(backend: Any) -> None:
    """Programs that name no backend use this one."""
    global_config.default_backend = as_backend(backend)


def flush_cache(backend: Any = None) -> bool:
    """Forget what a server has cached; False where there is no backend, or nothing to forget."""
    found = _found(backend)
    return found is not None and loop_thread().wait_for(found.flush_cache())


def get_server_info(backend: Any = None) -> dict[str, Any] | None:
    """What a backend tells of itself; None where there is no backend."""
    found = _found(backend)
    return None if found is None else loop_thread().wait_for(found.server_info())


def default_backend(backend: Any, num_api_spec_tokens: int | None) -> Backend:
    """The one to use; raises AssertionError where none is known."""
    found = _found(backend)
    assert found is not None, (
        'Please specify a backend: sgl.set_default_backend(sgl.RuntimeEndpoint("http://…")), or '
        "backend=…"
    )
    return found if num_api_spec_tokens is None else found.speculating(num_api_spec_tokens)


def as_backend(backend: Any) -> Backend:
    """Also of a Runtime or an Engine; raises TypeError where it is nothing of that."""
    if isinstance(backend, Backend):
        return backend
    inner = getattr(backend, "endpoint", None)  # of a Runtime
    if isinstance(inner, Backend):
        return inner
    engine = sys.modules.get("sgl.engine")
    if engine is not None and isinstance(backend, engine.Engine):
        from sgl.lang.backends.engine import backend_of

        return backend_of(backend)
    raise TypeError(
        f"{type(backend).__name__} is no backend: give sgl.RuntimeEndpoint, Runtime, Engine, "
        "OpenAI, Anthropic, VertexAI or LiteLLM"
    )


def _found(backend: Any) -> Backend | None:
    return global_config.default_backend if backend is None else as_backend(backend)
