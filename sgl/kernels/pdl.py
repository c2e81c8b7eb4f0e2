"""Programmatic dependent launch: a kernel starts while the one before it still ends.

A kernel launched so may only touch what never changes (weights) until it has called `gdc_wait`,
which returns when all kernels before it are done. Every kernel of ours waits, so this holds along
a whole chain of them. Needs compute capability 9.0; between tiny kernels it hides 1 to 2 µs.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Keywords for the launch of a kernel with a parameter USE_PDL."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return {"USE_PDL": False}
    return {"USE_PDL": True, "launch_pdl": True}
