"""The supervisor: starts the actors, watches over them, and stops everything together.

    a process ends, or makes no progress ──▶ clients are told ──▶ all are ended ──▶ exit code 1
    SIGTERM, SIGINT ──▶ the ingress drains ──▶ the others are ended ──▶ exit code 0
    either once more ──▶ all are ended at once

It serves nothing itself.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType

from sgl.actors.actor import start_log
from sgl.actors.group import ActorGroup
from sgl.config import ServerConfig
from sgl.errors import ActorDiedError

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 0.5
DRAIN_GRACE_S = 5.0  # for the ingress to end after its last request


class Signals:
    """SIGTERM and SIGINT as a descriptor to wait for; they interrupt nothing."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.received: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        os.eventfd_read(self.fd)


def serve(config: ServerConfig) -> int:
    """Run a server until it is told to stop (0) or fails (1). Raises ConfigError at the start."""
    signals = Signals()
    start_log("supervisor", config.log_level)
    group = ActorGroup(config)
    try:
        group.start()
        while not group.is_ready and not signals.received:
            group.poll(WATCH_EVERY_S, [signals.fd])
        if not group.is_ready:
            return 128 + signals.received[0]
        _watch(group, signals)
        return _drain(group, signals)
    except ActorDiedError as error:
        logger.error("%s", error)
        group.say_last_words(str(error))
        return 1
    finally:
        group.stop()


def _watch(group: ActorGroup, signals: Signals) -> None:
    """Return when a signal came; raises ActorDiedError when an actor ended or stands still."""
    watchdog = group.watchdog()
    warned: list[str] = []
    while not signals.received:
        group.poll(WATCH_EVERY_S, [signals.fd])
        watchdog.check()
        suspects = watchdog.stalled(share=0.5)
        if new := [name for name in suspects if name not in warned]:
            logger.warning("%s makes no progress; the stacks of its threads:", ", ".join(new))
            group.dump_stacks(new)
        warned = suspects


def _drain(group: ActorGroup, signals: Signals) -> int:
    """Wait for the running requests; a second signal ends the wait."""
    signals.clear()
    config = group.config
    delay = config.drain_delay if signals.received[0] == signal.SIGTERM else 0.0
    logger.info(
        "Stopping: what runs has %g s to finish; a second signal ends it now", config.drain_timeout
    )
    group.drain(delay, config.drain_timeout)
    deadline = time.monotonic() + delay + config.drain_timeout + DRAIN_GRACE_S
    ingress = group.child("ingress")
    while len(signals.received) < 2 and time.monotonic() < deadline:
        try:
            group.poll(WATCH_EVERY_S, [signals.fd])
        except ActorDiedError:
            if ingress.has_ended:
                return ingress.process.returncode
            raise
    return 1
