"""What this machine has, found out without importing torch (which takes seconds)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from sgl.config import Device
from sgl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The installed torch; `cuda` is the CUDA version it was built for, None for CPU builds."""

    version: str
    cuda: str | None


def torch_build() -> TorchBuild | None:
    """None where torch is not installed."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    cuda = re.search(r"^cuda\b.*=\s*['\"](.+)['\"]", text, re.MULTILINE)
    return TorchBuild(package_version("torch") or "unknown", cuda[1] if cuda else None)


def package_version(name: str) -> str | None:
    """None where the package is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def num_visible_gpus() -> int:
    """NVIDIA GPUs this process may use."""
    num_present = sum(
        re.fullmatch(r"nvidia\d+", device.name) is not None for device in Path("/dev").iterdir()
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_present
    chosen = [part.strip() for part in visible.split(",")]
    return min(num_present, sum(part not in ("", "-1") for part in chosen))


def num_usable_cores() -> int:
    """Cores this process may run on, under its affinity and its container's quota."""
    num_cores = len(os.sched_getaffinity(0))
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        num_cores = min(num_cores, max(1, int(quota) // int(period)))
    return num_cores


def cpu_flags() -> frozenset[str]:
    """Instruction sets the CPU offers, such as avx512_bf16."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return frozenset(flags[1].split()) if flags else frozenset()


def free_memory_gib() -> float:
    """Memory that can be had without swapping."""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(available[1]) / 2**20 if available else 0.0


def driver_version() -> str | None:
    """Version of the loaded NVIDIA driver."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _read("/proc/driver/nvidia/version"))
    return found[1] if found else None


def choose_device(wanted: str, *, tp_size: int, base_gpu_id: int) -> Device:
    """What --device means here; raises ConfigError where it cannot be had."""
    build = torch_build()
    if build is None:
        raise ConfigError("torch is not installed: pip install torch")
    num_gpus = num_visible_gpus()
    if wanted == "cpu" or (wanted == "auto" and (build.cuda is None or num_gpus == 0)):
        return "cpu"
    if build.cuda is None:
        raise ConfigError(
            f"--device cuda: torch {build.version} is a build for CPUs; install one for CUDA or "
            "use --device cpu"
        )
    if base_gpu_id + tp_size > num_gpus > 0:
        raise ConfigError(
            f"--tp-size {tp_size} from --base-gpu-id {base_gpu_id} needs {base_gpu_id + tp_size} "
            f"GPUs, {num_gpus} can be seen: lower --tp-size or --base-gpu-id, or widen "
            "CUDA_VISIBLE_DEVICES"
        )
    return "cuda"


def _read(path: str) -> str:
    """The text of a file of the kernel's; empty where this kernel does not have it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
