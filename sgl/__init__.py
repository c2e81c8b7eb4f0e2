"""sgl serves large language models fast, and lets people program them.

`import sgl` loads neither torch nor any client of an API: every name is fetched when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl.engine import Engine
    from sgl.lang.api import (
        assistant,
        assistant_begin,
        assistant_end,
        gen,
        gen_int,
        gen_string,
        image,
        select,
        separate_reasoning,
        system,
        system_begin,
        system_end,
        user,
        user_begin,
        user_end,
        video,
    )
    from sgl.lang.backends.anthropic import Anthropic
    from sgl.lang.backends.litellm import LiteLLM
    from sgl.lang.backends.openai import OpenAI
    from sgl.lang.backends.runtime_endpoint import RuntimeEndpoint
    from sgl.lang.backends.vertexai import VertexAI
    from sgl.lang.choices import (
        greedy_token_selection,
        token_length_normalized,
        unconditional_likelihood_normalized,
    )
    from sgl.lang.defaults import (
        flush_cache,
        get_server_info,
        global_config,
        set_default_backend,
    )
    from sgl.lang.program import function
    from sgl.lang.state import ProgramState
    from sgl.runtime import Runtime

__version__ = "0.1.0"
__all__ = [
    "Anthropic",
    "Engine",
    "LiteLLM",
    "OpenAI",
    "ProgramState",
    "Runtime",
    "RuntimeEndpoint",
    "VertexAI",
    "__version__",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "global_config",
    "greedy_token_selection",
    "image",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "video",
]

_NAMES = {
    "sgl.engine": ("Engine",),
    "sgl.lang.api": (
        *("gen", "gen_int", "gen_string", "select", "separate_reasoning", "image", "video"),
        *("system", "user", "assistant"),
        *("system_begin", "user_begin", "assistant_begin"),
        *("system_end", "user_end", "assistant_end"),
    ),
    "sgl.lang.backends.anthropic": ("Anthropic",),
    "sgl.lang.backends.litellm": ("LiteLLM",),
    "sgl.lang.backends.openai": ("OpenAI",),
    "sgl.lang.backends.runtime_endpoint": ("RuntimeEndpoint",),
    "sgl.lang.backends.vertexai": ("VertexAI",),
    "sgl.lang.choices": (
        "greedy_token_selection",
        "token_length_normalized",
        "unconditional_likelihood_normalized",
    ),
    "sgl.lang.defaults": (
        *("flush_cache", "get_server_info", "global_config", "set_default_backend"),
    ),
    "sgl.lang.program": ("function",),
    "sgl.lang.state": ("ProgramState",),
    "sgl.runtime": ("Runtime",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"sgl has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
