"""An engine in this process: no HTTP, and no thread for each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sgl.lang.backends.native import Fields, NativeBackend, written_template

if TYPE_CHECKING:
    from sgl.engine import Engine


class EngineBackend(NativeBackend):
    """Programs may name the engine itself as their backend."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        info = engine.get_model_info()
        self.keeps_tokens = info["keeps_tokens"]
        self.chat_template = written_template(info)

    async def ask(self, fields: Fields) -> Any:
        return await self._engine.async_generate(**_arguments(fields))

    async def ask_streamed(self, fields: Fields) -> AsyncIterator[Fields]:
        async for event in await self._engine.async_generate(**_arguments(fields)):
            yield event

    async def tokenize(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        tokens: Any = await asyncio.to_thread(self._engine.tokenize, texts, add_special_tokens)
        return tokens  # type: ignore[no-any-return]

    async def flush_cache(self) -> bool:
        return await asyncio.to_thread(self._engine.flush_cache)

    async def server_info(self) -> dict[str, Any] | None:
        return self._engine.get_server_info()


_backends: WeakKeyDictionary[Engine, EngineBackend] = WeakKeyDictionary()


def backend_of(engine: Engine) -> EngineBackend:
    """The same for every program."""
    if engine not in _backends:
        _backends[engine] = EngineBackend(engine)
    return _backends[engine]


def _arguments(fields: Fields) -> Fields:
    return {("prompt" if name == "text" else name): value for name, value in fields.items()}
