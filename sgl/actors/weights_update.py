"""When the workers may replace the weights: between the requests that run and those that wait.

ask ──▶ held: nothing new starts ──▶ due: nothing runs any more ──▶ the workers load
                                                                         │
what waits starts ◀── cache flushed, if the weights are new ◀── take ◀── Reply
"""

from __future__ import annotations

import logging

from sgl.messages import Reply, UpdateWeights
from sgl.scheduling.batcher import Batcher

logger = logging.getLogger(__name__)


class WeightsUpdate:
    """The scheduler's part of an update; there is one at a time."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._wanted: UpdateWeights | None = None
        self._is_sent = False

    @property
    def is_under_way(self) -> bool:
        """Whether the workers load: no step can be expected."""
        return self._is_sent

    def ask(self, message: UpdateWeights) -> Reply | None:
        """Begin to wait; a refusal where another update is not over yet."""
        if self._wanted is not None:
            text = f"the weights of {self._wanted.path} are being loaded: try again after that"
            return Reply(message.call_id, ok=False, text=text)
        logger.info("Weights update: waiting for %d requests to end", self._batcher.num_begun)
        self._wanted = message
        self._batcher.queues.is_held = True
        return None

    def due(self) -> UpdateWeights | None:
        """What to tell the workers, once, when nothing runs any more."""
        if self._wanted is None or self._is_sent or not self._batcher.is_drained:
            return None
        self._is_sent = True
        return self._wanted

    def take(self, reply: Reply) -> None:
        """A reply of the workers; if it is to the update, requests go on."""
        if self._wanted is None or reply.call_id != self._wanted.call_id:
            return
        if reply.ok:
            self._batcher.store.flush()  # no request that waits holds a page
        self._wanted, self._is_sent = None, False
        self._batcher.queues.is_held = False
