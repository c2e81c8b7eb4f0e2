"""Waiting for a state to change, on a thread or on an event loop.

A thread that waits can say so first, so that another takes over what it cannot do (`run_batch`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from sgl.lang.loop import loop_thread

OnChange: TypeAlias = Callable[[Callable[[], None]], None]

_local = threading.local()


@contextmanager
def telling(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """They are called whenever this thread begins to wait, and when it goes on."""
    _local.told = begin, end
    try:
        yield
    finally:
        del _local.told


def wait(is_so: Callable[[], bool], on_change: OnChange, timeout: float | None) -> bool:
    """Until something is so, or `timeout` seconds are over: False."""
    if is_so():
        return True
    loop_thread().check_not_here()
    begin, end = getattr(_local, "told", (None, None))
    if begin is None or end is None:
        return _wait(is_so, on_change, timeout)
    begin()
    try:
        return _wait(is_so, on_change, timeout)
    finally:
        end()


def _wait(is_so: Callable[[], bool], on_change: OnChange, timeout: float | None) -> bool:
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        changed = threading.Event()
        on_change(changed.set)
        if is_so():  # it may have come to be so before anybody could tell
            return True
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return False
        changed.wait(left)


async def wait_async(is_so: Callable[[], bool], on_change: OnChange) -> None:
    loop = asyncio.get_running_loop()
    while not is_so():
        changed = asyncio.Event()

        def wake(changed: asyncio.Event = changed) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        on_change(wake)
        if is_so():
            return
        await changed.wait()
