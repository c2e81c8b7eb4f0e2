"""What an HTTP server has to look at now and then: idle connections, and an engine that hangs."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestHandler

from sgl.metrics import SchedulerStatus


class HeaderDeadline:
    """Closes connections that have sent no whole request header within `timeout_s`.

    aiohttp itself only closes connections that are idle after a request.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._first_seen: dict[RequestHandler, float] = {}
        self._served: set[RequestHandler] = set()

    def mark_served(self, connection: RequestHandler) -> None:
        self._served.add(connection)

    def sweep(self, connections: Iterable[RequestHandler], now: float) -> None:
        current = set(connections)
        self._served &= current
        self._first_seen = {
            connection: self._first_seen.get(connection, now)
            for connection in current - self._served
        }
        for connection, first_seen in self._first_seen.items():
            if now - first_seen > self._timeout_s and connection.transport is not None:
                connection.transport.abort()


class ExpectMalformed(logging.Filter):
    """Of aiohttp's log: no traceback for what is not HTTP. Its sender has got a 400."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


class StallWatch:
    """Whether the scheduler has work but made no step for `timeout_s`; 0 turns it off."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._num_steps = -1.0
        self._since: float | None = None
        self.is_stalled = False

    def look(self, status: SchedulerStatus, now: float) -> None:
        has_work = status.num_running_reqs + status.num_queue_reqs > 0 and not status.is_loading
        if not has_work or status.num_steps != self._num_steps:
            self._num_steps, self._since = status.num_steps, None
        elif self._since is None:
            self._since = now
        waited_s = 0.0 if self._since is None else now - self._since
        self.is_stalled = 0 < self._timeout_s < waited_s
