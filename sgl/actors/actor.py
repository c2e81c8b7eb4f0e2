"""How an actor's process begins, works and ends.

    supervisor ── python -m sgl.actors KIND FD PARENT ──▶ __main__: dies with its parent
               ── memfd FD: Bootstrap (JSON) ───────────▶ main: reads it, runs the module
               ◀─ ring: ActorReady or ActorFailed ───────

An actor inherits the descriptors of its rings and nothing else: no names, no sockets, no pickles.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from importlib import import_module
from typing import Any

import msgspec

from sgl.actors.channel import Poller, Receiver, Sender
from sgl.actors.ring import RingHandle, RingReader, RingWriter
from sgl.actors.status_page import StatusPage
from sgl.config import Device, ServerConfig
from sgl.errors import ConfigError
from sgl.messages import ActorFailed, ActorReady, ActorToSupervisor
from sgl.models.config import ModelConfig
from sgl.tokenizer import Tokenizer

ACTORS = {
    "worker": "sgl.actors.worker",
    "scheduler": "sgl.actors.scheduler",
    "detokenizer": "sgl.actors.detokenizer",
    "ingress": "sgl.actors.ingress",
}
IDLE_WAIT_S = 1.0  # an idle actor looks around once a second, to show that it lives


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor tells a process at its start.

    rings  name of the channel -> numbers of its `RingHandle`
    rank   of a worker
    paths  model, tokenizer: found once by the supervisor
    rendezvous_fd  an empty file where the ranks meet
    """

    name: str
    rank: int
    parent_pid: int
    config: dict[str, Any]
    rings: dict[str, list[int]]
    status_fd: int
    rendezvous_fd: int
    actor_names: list[str]
    paths: dict[str, str]
    device: Device
    num_cores: int
    random_seed: int

    @classmethod
    def read(cls, fd: int) -> Bootstrap:
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            return msgspec.json.decode(file.read(), type=cls)

    def to_memfd(self) -> int:
        """A descriptor that a child can inherit: `ps` would show arguments, with their secrets."""
        fd = os.memfd_create("sgl-bootstrap", 0)
        os.write(fd, msgspec.json.encode(self))
        return fd

    def inherited_fds(self) -> list[int]:
        rings = [RingHandle.from_list(numbers) for numbers in self.rings.values()]
        return [self.status_fd, self.rendezvous_fd, *(fd for ring in rings for fd in ring.fds())]


class Context:
    """What an actor's module is handed: its settings and its ends of the rings."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self.bootstrap = bootstrap
        self.name = bootstrap.name
        self.config = ServerConfig(**bootstrap.config)
        self.status = StatusPage(bootstrap.status_fd, bootstrap.actor_names)
        self.limits = self.config.limits_on(bootstrap.device, num_cores=bootstrap.num_cores)
        self._supervisor: Sender[ActorToSupervisor] = self.sender(f"{self.name}->supervisor")

    def sender(self, ring: str) -> Sender[Any]:
        return Sender(RingWriter(self._handle(ring)))

    def receiver(self, ring: str, union_type: Any) -> Receiver[Any]:
        return Receiver(RingReader(self._handle(ring)), union_type)

    @cached_property
    def model_config(self) -> ModelConfig:
        return ModelConfig.load(
            self.bootstrap.paths["model"],
            self.config.model_overrides,
            is_embedding=self.config.is_embedding,
        )

    @property
    def context_len(self) -> int:
        """Prompt and answer of a request together, at most."""
        return self.config.context_length or self.model_config.context_len

    def load_tokenizer(self) -> Tokenizer | None:
        """None with --skip-tokenizer-init."""
        if self.config.skip_tokenizer_init:
            return None
        return Tokenizer.load(self.bootstrap.paths["tokenizer"])

    def ready(self, note: str = "") -> None:
        """Tell the supervisor that this actor works."""
        self._supervisor.send(ActorReady(note))

    def failed(self, message: str, *, is_config: bool) -> None:
        """Tell the supervisor why this actor cannot work."""
        self._supervisor.send(ActorFailed(message, is_config))

    def run_turns(
        self,
        turn: Callable[[], bool],
        poller: Poller,
        *,
        idle_wait_s: Callable[[], float] = lambda: IDLE_WAIT_S,
        spin_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Call `turn` as long as there is work, else wait for messages; ends with the parent.

        spin_s  how long to poll before going to sleep: worth it while an answer is due soon
        """
        poller.watch("supervisor", os.pidfd_open(self.bootstrap.parent_pid))
        while True:
            self.status.beat(self.name)
            if not turn():
                poller.wait(idle_wait_s(), spin_s())

    def _handle(self, ring: str) -> RingHandle:
        return RingHandle.from_list(self.bootstrap.rings[ring])


def main(kind: str, bootstrap_fd: int) -> None:
    """An actor's process, from its bootstrap to its end."""
    bootstrap = Bootstrap.read(bootstrap_fd)
    _set_title(bootstrap.name)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    context = Context(bootstrap)
    start_log(bootstrap.name, context.config.log_level)
    try:
        import_module(ACTORS[kind]).run(context)
    except ConfigError as error:
        context.failed(str(error), is_config=True)
        sys.exit(2)
    except Exception as error:  # the one place where a crash becomes a message
        logging.getLogger(__name__).debug("the actor failed", exc_info=True)
        context.failed("".join(traceback.format_exception(error)).strip(), is_config=False)
        sys.exit(1)


def start_log(name: str, level: str) -> None:
    """Log to stderr, each line with its time and its process."""
    logging.basicConfig(
        level=level.upper(),
        format=f"[%(asctime)s {name}] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        stream=sys.stderr,
        force=True,
    )


def config_fields(config: ServerConfig) -> dict[str, Any]:
    """A config as the plain values that travel in a bootstrap."""
    return asdict(config)


def _set_title(name: str) -> None:
    from setproctitle import setproctitle

    setproctitle(f"sgl::{name}")
