"""The processes of one engine: made together, ended together.

    start ──▶ rings, status page ──▶ worker 0 … n, scheduler, detokenizer, ingress
    poll ───▶ each says ActorReady, or why it cannot work
    stop ───▶ all are killed; no process or descriptor is left

Nothing here has a name in a file system, not even the store where the ranks meet: a group that is
killed, in whatever way and at whatever moment, leaves nothing to clean up.

Without an ingress the caller (`sgl.Engine`) holds its ends of the rings. Children die with this
process, whatever kills it (see `__main__.py`).
"""

from __future__ import annotations

import logging
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import assert_never

from sgl.actors.actor import Bootstrap
from sgl.actors.channel import Receiver, Sender
from sgl.actors.ring import RingHandle, RingReader, RingWriter
from sgl.actors.status_page import StatusPage
from sgl.actors.watchdog import Watchdog
from sgl.config import Device, ServerConfig
from sgl.errors import ActorDiedError, ConfigError
from sgl.hardware import choose_device, num_usable_cores
from sgl.messages import (
    ActorFailed,
    ActorReady,
    ActorToSupervisor,
    Drain,
    EngineDied,
    SupervisorToIngress,
)
from sgl.model_files import resolve_model_path, resolve_tokenizer_path
from sgl.models.config import ModelConfig

logger = logging.getLogger(__name__)

LAST_WORDS_S = 1.0  # what the ingress gets to tell its clients that the engine is gone


@dataclass(slots=True)
class Child:
    """A started actor."""

    name: str
    process: subprocess.Popen[bytes]
    pidfd: int
    reports: Receiver[ActorToSupervisor]
    is_ready: bool = False

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def describe_end(self) -> str:
        code = self.process.returncode
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return f"the {self.name} process ended unexpectedly ({how})"


class ActorGroup:
    """Starts an engine's processes; `poll` is to be called until `is_ready`, and then on."""

    def __init__(self, config: ServerConfig, *, has_ingress: bool = True) -> None:
        self.config = config
        self.children: list[Child] = []
        self.rings: dict[str, RingHandle] = {}
        self.paths: dict[str, str] = {}
        workers = [f"worker{rank}" for rank in range(config.tp_size)]
        ingress = ["ingress"] if has_ingress else []
        self.names = [*workers, "scheduler", "detokenizer", *ingress]
        self.status = StatusPage.create(self.names)
        self._rendezvous_fd = os.memfd_create("sgl-rendezvous", os.MFD_CLOEXEC)
        self._descriptors = ExitStack()  # closes all that this group opened
        self._descriptors.callback(self.status.close)
        self._descriptors.callback(os.close, self._rendezvous_fd)
        self._to_ingress: Sender[SupervisorToIngress] | None = None

    @property
    def is_ready(self) -> bool:
        return all(child.is_ready for child in self.children)

    def start(self) -> None:
        """Start all processes at once. Raises ConfigError for what can be seen to be wrong now."""
        config = self.config
        device = choose_device(
            config.device, tp_size=config.tp_size, base_gpu_id=config.base_gpu_id
        )
        model_path = resolve_model_path(config)
        _check_model(config, model_path)
        if "ingress" in self.names:
            _check_port(config)
        self.rings = {ring: self._make_ring() for ring in self._ring_names()}
        self._to_ingress = Sender(self.open_writer("supervisor->ingress"))
        self.paths = {
            "model": model_path,
            "tokenizer": resolve_tokenizer_path(config, model_path),
        }
        seed = random.getrandbits(62) if config.random_seed is None else config.random_seed
        for name in self.names:
            self.children.append(self._spawn(name, device, seed))

    def poll(self, timeout_s: float, other_fds: Sequence[int] = ()) -> None:
        """Wait for news of the children, or for one of the other descriptors.

        Raises ConfigError or ActorDiedError where a process cannot start, ActorDiedError where one
        has ended.
        """
        poller = select.poll()
        for fd in [*other_fds, *(child.pidfd for child in self.children)]:
            poller.register(fd, select.POLLIN)
        for child in self.children:
            if not child.is_ready:
                poller.register(child.reports.fileno(), select.POLLIN)
        poller.poll(timeout_s * 1000)
        for child in self.children:
            has_ended = child.has_ended
            for report in child.reports.receive():
                self._take_report(child, report)
            if has_ended:
                raise ActorDiedError(child.describe_end())

    def open_writer(self, ring: str) -> RingWriter:
        """The writing end of a ring, for as long as the group lives."""
        writer = RingWriter(self.rings[ring])
        self._descriptors.callback(writer.close)
        return writer

    def open_reader(self, ring: str) -> RingReader:
        """The reading end of a ring, for as long as the group lives."""
        reader = RingReader(self.rings[ring])
        self._descriptors.callback(reader.close)
        return reader

    def watchdog(self) -> Watchdog:
        """Made once the group is ready: a start may take longer than a turn."""
        return Watchdog(self.status, self.names, self.config.watchdog_timeout, time.monotonic)

    def child(self, name: str) -> Child:
        return next(child for child in self.children if child.name == name)

    def drain(self, delay_s: float, timeout_s: float) -> None:
        """Let the ingress go on for a while, then finish what runs; it ends by itself then."""
        assert self._to_ingress
        self._to_ingress.send(Drain(delay_s, timeout_s))

    def say_last_words(self, reason: str) -> None:
        """Let the ingress tell its clients that the engine is gone; the others end meanwhile."""
        assert self._to_ingress
        self._to_ingress.send(EngineDied(reason))
        for child in self.children:
            if child.name != "ingress":
                child.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.child("ingress").process.wait(LAST_WORDS_S)

    def dump_stacks(self, names: Sequence[str]) -> None:
        """Let these actors write the stacks of all their threads to stderr."""
        for name in names:
            self.child(name).process.send_signal(signal.SIGUSR1)

    def stop(self) -> None:
        """End all processes and give everything back. May be called more than once.

        They are not asked: none has anything to finish, and one that hangs would not hear.
        """
        for child in reversed(self.children):
            child.process.kill()
        for child in self.children:
            child.process.wait()
        self._descriptors.close()
        self.children, self.rings = [], {}

    def _take_report(self, child: Child, report: ActorToSupervisor) -> None:
        match report:
            case ActorReady():
                child.is_ready = True
                logger.debug("%s is ready. %s", child.name, report.note)
            case ActorFailed(is_config=True):
                raise ConfigError(report.message)
            case ActorFailed():
                raise ActorDiedError(f"the {child.name} process failed:\n{report.message}")
            case _:
                assert_never(report)

    def _make_ring(self) -> RingHandle:
        handle = RingHandle.create()
        self._descriptors.callback(handle.close)
        return handle

    def _ring_names(self) -> list[str]:
        to_workers = [f"scheduler->{name}" for name in self.names if name.startswith("worker")]
        reports = [f"{name}->supervisor" for name in self.names]
        return [
            "ingress->scheduler",
            "scheduler->detokenizer",
            "detokenizer->scheduler",
            "detokenizer->ingress",
            "worker0->scheduler",
            "supervisor->ingress",
            *to_workers,
            *reports,
        ]

    def _spawn(self, name: str, device: Device, seed: int) -> Child:
        kind = name.rstrip("0123456789")
        own = {ring: handle for ring, handle in self.rings.items() if name in ring.split("->")}
        bootstrap = Bootstrap(
            name=name,
            rank=int(name.removeprefix(kind) or 0),
            parent_pid=os.getpid(),
            config=asdict(self.config),
            rings={ring: handle.to_list() for ring, handle in own.items()},
            status_fd=self.status.fd,
            rendezvous_fd=self._rendezvous_fd,
            actor_names=self.names,
            paths=self.paths,
            device=device,
            num_cores=num_usable_cores(),
            random_seed=seed,
        )
        fd = bootstrap.to_memfd()
        process = subprocess.Popen(
            [sys.executable, "-m", "sgl.actors", kind, str(fd), str(os.getpid())],
            pass_fds=[fd, *bootstrap.inherited_fds()],
            stdin=subprocess.DEVNULL,
            env=_environment(),
            process_group=0,  # Ctrl-C in a terminal is for the supervisor alone
        )
        os.close(fd)
        pidfd = os.pidfd_open(process.pid)
        self._descriptors.callback(os.close, pidfd)
        reports: Receiver[ActorToSupervisor] = Receiver(
            self.open_reader(f"{name}->supervisor"), ActorToSupervisor
        )
        return Child(name, process, pidfd, reports)


_DEFAULT_ENVIRONMENT = {
    # Before CUDA 12.6 recorded graphs crash once the tracing library of a profile that has ended is
    # taken down. Torch leaves it up for graphs of its own; it does not know of ours.
    "TEARDOWN_CUPTI": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "MALLOC_ARENA_MAX": "2",
    # OpenMP's threads wait for each other by spinning, for milliseconds: where another process
    # needs the core they wait for nothing, and steps take ten times as long. So many turns (some
    # 100 µs) bridge the gap between two operators; fewer cost a third of the speed on idle cores.
    "GOMP_SPINCOUNT": "20000",
}


def _environment() -> dict[str, str]:
    """The parent's, and the folder this package was imported from."""
    folder = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    return _DEFAULT_ENVIRONMENT | os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _check_model(config: ServerConfig, model_path: str) -> None:
    """Find out at once, not in the middle of loading, what the model does not allow."""
    model = ModelConfig.load(model_path, config.model_overrides, is_embedding=config.is_embedding)
    if config.context_length and config.context_length > model.context_len:
        raise ConfigError(
            f"--context-length {config.context_length} is longer than the model's context of "
            f"{model.context_len} tokens: lower it"
        )


def _check_port(config: ServerConfig) -> None:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host} port {config.port}: {error.strerror}; stop what "
                f"uses it or choose another, for instance --port {config.port + 1}"
            ) from None
