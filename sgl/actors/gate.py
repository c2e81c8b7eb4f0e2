"""Whether the server takes requests: from loading to the last answer.

loading ── warm-up done ──▶ open ── SIGTERM ──▶ leaving ── --drain-delay ──▶ closed
 503                        takes requests      takes them, but is not ready     503
"""

from __future__ import annotations

from enum import Enum, auto

from sgl.errors import OverloadedError


class Phase(Enum):
    LOADING = auto()
    OPEN = auto()
    LEAVING = auto()
    CLOSED = auto()


class Gate:
    """The phase, as the routes ask for it."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING

    @property
    def is_ready(self) -> bool:
        return self.phase is Phase.OPEN

    def check(self) -> None:
        """Raises OverloadedError where no request is taken."""
        match self.phase:
            case Phase.LOADING:
                raise OverloadedError("the model is still being loaded: try again in a few seconds")
            case Phase.CLOSED:
                raise OverloadedError("the server is shutting down")
            case Phase.OPEN | Phase.LEAVING:
                return
