"""Which checkpoint the engine runs, and its change to another one."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from sgl.actors.front import Front
from sgl.actors.questions import told
from sgl.config import ServerConfig
from sgl.errors import ConfigError, InvalidRequestError
from sgl.messages import GetWeight, UpdateWeights
from sgl.model_files import resolve_new_weights
from sgl.protocol.administration import WeightRequest, WeightsRequest


class ServedWeights:
    """
    path  of the checkpoint that runs, as it was found
    """

    def __init__(self, config: ServerConfig, path: str, front: Front) -> None:
        self.path = path
        self._config = config
        self._front = front
        self._changed: dict[str, Any] = {}
        self._updates: set[asyncio.Task[str]] = set()

    def settings(self) -> dict[str, Any]:
        """Settings of the server that are not what they were at its start."""
        return self._changed

    async def update(self, wanted: WeightsRequest) -> str:
        """What was loaded; raises InvalidRequestError where it was not, and all is as it was.

        It goes on if whoever asked does not wait for its end.
        """
        task = asyncio.create_task(self._update(wanted))
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)
        return await asyncio.shield(task)

    async def show(self, wanted: WeightRequest) -> str:
        """The first rows of a weight, as JSON; raises InvalidRequestError."""
        make = partial(GetWeight, name=wanted.name, max_rows=wanted.truncate_size)
        return told(await self._front.ask(make))

    async def _update(self, wanted: WeightsRequest) -> str:
        load_format = wanted.load_format or "auto"
        try:
            path = await asyncio.to_thread(
                resolve_new_weights, wanted.model_path, load_format, self._config
            )
        except ConfigError as error:
            raise InvalidRequestError(str(error), param="model_path") from None
        except OSError as error:
            why = f"model_path cannot be read: {error.strerror}"
            raise InvalidRequestError(why, param="model_path") from None
        text = told(
            await self._front.ask(partial(UpdateWeights, path=path, load_format=load_format))
        )
        self.path = path
        self._changed = {"model_path": wanted.model_path, "load_format": load_format}
        return text
