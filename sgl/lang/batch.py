"""Many programs side by side, on few threads.

A body that only adds to its state is over in microseconds: one thread runs them all, and what they
added is done on the loop. A thread whose body waits, for a variable or in code of its own, cannot
run others: another is started, so that one is always free as long as programs are left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from sgl.lang import waiting
from sgl.lang.execution import Execution

if TYPE_CHECKING:
    from tqdm import tqdm

STUCK_S = 0.01  # a body that takes longer waits for something that cannot be seen from here
AHEAD = 200  # states that may be ready before somebody takes them, with an iterator


class Run(Protocol):
    """A body that can be called, and what it works with."""

    @property
    def execution(self) -> Execution: ...

    def __call__(self) -> None: ...


R = TypeVar("R", bound=Run)


class Batch(Generic[R]):
    """
    start  makes the run of an index
    num    how many there are
    limit  at work at a time
    """

    def __init__(
        self, start: Callable[[int], R], num: int, limit: int, has_progress_bar: bool
    ) -> None:
        self._start = start
        self._num = num
        self._limit = limit
        self._has_progress_bar = has_progress_bar
        self._runs: dict[int, R] = {}  # begun, and not taken
        self._done: set[int] = set()  # of these
        self._num_begun = 0
        self._num_done = 0
        self._num_taken = 0
        self._num_threads = 0
        self._num_waiting = 0  # of the threads: in a body that waits
        self._num_events = 0
        self._error: BaseException | None = None
        self._is_over = False
        self._changed = threading.Condition()

    def iterate(self) -> Iterator[R]:
        """The runs in their order, each when it is done; raises what a body raised."""
        bar = _progress_bar(self._num) if self._has_progress_bar else None
        try:
            for index in range(self._num):
                self._wait_for(index, bar)
                with self._changed:
                    self._num_taken += 1
                    self._done.remove(index)
                    run = self._runs.pop(index)
                    self._changed.notify_all()
                yield run
        finally:
            self._end()
            if bar is not None:
                bar.close()

    def _wait_for(self, index: int, bar: tqdm[Any] | None) -> None:
        """Meanwhile see to it that a thread is free."""
        num_seen = -1
        with self._changed:
            while True:
                if bar is not None:
                    bar.update(self._num_done - bar.n)
                if self._error is not None:
                    raise self._error
                if index in self._done:
                    return
                is_stuck, num_seen = num_seen == self._num_events, self._num_events
                is_free = self._num_threads > self._num_waiting and not is_stuck
                if self._has_work() and not is_free:
                    self._start_thread()
                self._changed.wait(STUCK_S if self._has_work() else None)

    def _has_work(self) -> bool:
        """Whether a program could begin now."""
        is_room = self._num_begun - self._num_done < self._limit
        is_near = self._num_begun - self._num_taken < self._limit + AHEAD
        return self._num_begun < self._num and is_room and is_near and not self._is_over

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="sgl-batch", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the machine gives no more: those that are there do the work
            if self._num_threads == 0:
                raise
            return
        self._num_threads += 1

    def _work(self) -> None:
        """One thread: bodies, as long as there are some and no other thread is free."""
        with waiting.telling(self._begin_wait, self._end_wait):
            while (index := self._take()) is not None:
                try:
                    run = self._begin(index)
                    run()
                except BaseException as error:
                    self._fail(index, error)
                else:
                    run.execution.when_done(partial(self._finish, index))

    def _take(self) -> int | None:
        with self._changed:
            self._num_events += 1
            while not self._has_work():
                is_needed = self._num_threads - self._num_waiting <= 1
                if not is_needed or self._is_over or self._num_begun == self._num:
                    self._num_threads -= 1
                    return None
                self._changed.wait()
            self._num_begun += 1
            return self._num_begun - 1

    def _begin(self, index: int) -> R:
        run = self._start(index)
        with self._changed:
            self._runs[index] = run
        return run

    def _begin_wait(self) -> None:
        with self._changed:
            self._num_waiting += 1
            self._num_events += 1
            if self._has_work() and self._num_threads == self._num_waiting:
                self._start_thread()

    def _end_wait(self) -> None:
        with self._changed:
            self._num_waiting -= 1

    def _finish(self, index: int) -> None:
        with self._changed:
            self._num_done += 1
            self._num_events += 1
            self._done.add(index)
            self._changed.notify_all()

    def _fail(self, index: int, error: BaseException) -> None:
        with self._changed:
            if self._error is None and not self._is_over:
                error.add_note(f"in run {index} of the batch")
                self._error = error
            self._changed.notify_all()

    def _end(self) -> None:
        """Whatever is still at work is ended."""
        with self._changed:
            self._is_over = True
            left = [run for index, run in self._runs.items() if index not in self._done]
            self._changed.notify_all()
        for run in left:
            run.execution.cancel()


def _progress_bar(num: int) -> tqdm[Any]:
    from tqdm import tqdm

    return tqdm(total=num)
