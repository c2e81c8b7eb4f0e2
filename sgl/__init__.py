"""sgl serves large language models fast, and lets people program them.

`import sgl` loads neither torch nor any client of an API: every name is fetched when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]

_HOMES = {"Engine": "sgl.engine"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"sgl has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
