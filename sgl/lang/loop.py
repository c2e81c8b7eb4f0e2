"""The event loop that all programs of a process share, on a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop on a daemon thread. `at_exit` is for what must be closed on it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._closers: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._live, name="sgl-language", daemon=True)
        self._thread.start()
        atexit.register(self._close)

    @property
    def is_mine(self) -> bool:
        """False in a child that was forked: the thread was left behind."""
        return self._pid == os.getpid()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it there and wait here; an interrupt cancels it."""
        try:
            self.check_not_here()
        except RuntimeError:
            work.close()
            raise
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def check_not_here(self) -> None:
        """Raises RuntimeError on the loop's own thread, where waiting would stop every program."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("a backend must not wait for a program: use what it can await")

    def at_exit(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._closers.append(close)

    def _live(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def _cancel_all(self) -> None:
        """Programs that nobody waits for any more."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _close(self) -> None:
        if not self.is_mine:
            return
        for close in [self._cancel_all, *self._closers]:
            try:
                self.submit(close()).result(timeout=1)
            except Exception:  # the program ends: nobody is left who could be told
                continue
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=1)


_lock = threading.Lock()
_shared: LoopThread | None = None


def loop_thread() -> LoopThread:
    """The one of this process, started when first asked for."""
    global _shared
    with _lock:
        if _shared is None or not _shared.is_mine:
            _shared = LoopThread()
        return _shared
