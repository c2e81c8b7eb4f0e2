"""How many multiprocessors there are to share the work of a kernel."""

from __future__ import annotations

import torch


def num_cores(device: torch.device) -> int:
    """Multiprocessors of a GPU; where kernels are interpreted, a few."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
