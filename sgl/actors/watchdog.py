"""Notices actors that live but no longer go round their loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sgl.actors.status_page import StatusPage
from sgl.errors import ActorDiedError


class Watchdog:
    """Compares progress counters. An idle actor still beats once a second."""

    def __init__(
        self, status: StatusPage, names: Sequence[str], timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self._status = status
        self._timeout_s = timeout_s
        self._clock = clock
        self._seen = {name: (status.progress(name), clock()) for name in names}

    def check(self) -> None:
        """Raises ActorDiedError when an actor stands still."""
        if stalled := self.stalled():
            raise ActorDiedError(f"{', '.join(stalled)} made no progress for {self._timeout_s:g} s")

    def stalled(self, share: float = 1.0) -> list[str]:
        """Actors without progress for `share` of the timeout; none where the timeout is 0."""
        now = self._clock()
        for name, (progress, _) in self._seen.items():
            if (current := self._status.progress(name)) != progress:
                self._seen[name] = (current, now)
        if not self._timeout_s:
            return []
        return [
            name for name, (_, since) in self._seen.items() if now - since > share * self._timeout_s
        ]
