"""Connections of all backends that speak HTTP: one pool, on the loop of all programs."""

from __future__ import annotations

import resource

import aiohttp

from sgl.lang.loop import LoopThread, loop_thread

CONNECT_TIMEOUT_S = 10
MAX_CONNECTIONS = 1024
MAX_LINE_BYTES = 2**22  # of an event of a stream

_sessions: dict[LoopThread, aiohttp.ClientSession] = {}


def http_session() -> aiohttp.ClientSession:
    """Call it on the loop. It is closed when the program ends."""
    thread = loop_thread()
    if thread not in _sessions:
        _sessions.clear()  # those of a process that this one was forked from
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_max_connections()),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            read_bufsize=MAX_LINE_BYTES,
        )
        _sessions[thread] = session
        thread.at_exit(session.close)
    return _sessions[thread]


def _max_connections() -> int:
    """Half of the files that this process may open; requests beyond them wait for a free one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)
