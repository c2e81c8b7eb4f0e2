"""Weights of the next kernel on their way into the L2 cache while a small kernel computes.

Between two matrix products of a decode step run kernels too small to keep the memory busy. A few
extra programs of theirs ask for the start of the next weight, which then waits in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import supports_pdl

MAX_ROWS = 128  # with more, the kernels in between are long and the products read weights once
_BYTES_PER_PROGRAM = 1 << 20


@triton.jit
def prefetch(weight, num_bytes, part, NUM_LINES: tl.constexpr = 256):
    """Ask for megabyte `part` of `weight`, in lines of 4096 bytes; the last one stands for those
    behind the end."""
    line = part.to(tl.int64) * NUM_LINES + tl.arange(0, NUM_LINES)
    offset = tl.minimum(line * 4096, num_bytes - 4096)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 4096;\nmov.u32 $0, 0;",
        "=r,l",
        [weight.to(tl.int64) + offset],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def num_programs(weight: Tensor | None, num_rows: int, max_bytes: int) -> int:
    """Extra programs that prefetch `weight` beside a kernel of `num_rows` rows; 0: not worth it."""
    if weight is None or num_rows > MAX_ROWS or not supports_pdl(weight.device):
        return 0
    return min(num_bytes(weight), max_bytes) // _BYTES_PER_PROGRAM


def num_bytes(weight: Tensor | None) -> int:
    return weight.numel() * weight.itemsize if weight is not None else 0
