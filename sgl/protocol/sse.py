"""Server-sent events: one JSON value each, and the word that ends the stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy that collects the stream would make it useless
}


def event(payload: Any) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def events(payloads: Iterable[Any]) -> bytes:
    """Several events as one piece, for one write."""
    return b"".join(map(event, payloads))
