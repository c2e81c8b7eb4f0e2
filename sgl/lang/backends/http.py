"""Connections of all backends that speak HTTP: one pool, on the loop of all programs."""

from __future__ import annotations

import aiohttp

from sgl.lang.loop import LoopThread, loop_thread

CONNECT_TIMEOUT_S = 10
MAX_LINE_BYTES = 2**22  # of an event of a stream

_sessions: dict[LoopThread, aiohttp.ClientSession] = {}


def http_session() -> aiohttp.ClientSession:
    """Call it on the loop. It is closed when the program ends."""
    thread = loop_thread()
    if thread not in _sessions:
        _sessions.clear()  # those of a process that this one was forked from
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S),
            read_bufsize=MAX_LINE_BYTES,
        )
        _sessions[thread] = session
        thread.at_exit(session.close)
    return _sessions[thread]
