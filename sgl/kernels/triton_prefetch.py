"""Weights of the next kernel on their way into the L2 cache while a small kernel computes.

Between two matrix products of a decode step run kernels too small to keep the memory busy. A few
extra programs of theirs ask for the start of the next weight, which then waits in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BYTES_PER_LINE = 4096  # of one request to the memory
LINES_PER_PROGRAM = 256
MAX_ROWS = 128  # with more, the kernels in between are long and the products read weights once


@triton.jit
def prefetch(weight, num_bytes, part, BYTES_PER_LINE: tl.constexpr, NUM_LINES: tl.constexpr):
    """Ask for lines part * NUM_LINES … of `weight`; those behind its end ask for the last again."""
    line = part.to(tl.int64) * NUM_LINES + tl.arange(0, NUM_LINES)
    offset = tl.minimum(line * BYTES_PER_LINE, num_bytes - BYTES_PER_LINE)
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
    if weight is None or num_rows > MAX_ROWS or weight.device.type != "cuda":
        return 0
    num_bytes = min(weight.numel() * weight.itemsize, max_bytes)
    return num_bytes // (BYTES_PER_LINE * LINES_PER_PROGRAM)
