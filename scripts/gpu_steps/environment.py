"""Which machine and which packages the results are of."""

from __future__ import annotations

import platform
import sys

import torch

from scripts.gpu_steps.findings import parser
from sgl.hardware import driver_version, num_usable_cores, num_visible_gpus, package_version

PACKAGES = ("triton", "transformers", "tokenizers", "numpy", "msgspec", "gguf", "flashinfer-python")


def main() -> None:
    arguments = parser().parse_args()
    versions = {name: package_version(name) for name in PACKAGES}
    machine = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": num_usable_cores(),
        "gpus": num_visible_gpus(),
        "torch": torch.__version__,
        "driver": driver_version(),
    }
    if arguments.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": gpu.name,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda,
        }
    arguments.found.add("environment", True, **machine, **versions)
    print(sys.version, torch.__config__.show())


if __name__ == "__main__":
    main()
