"""A sum over ranks, its addition to the residual stream and the norm of that, in one kernel.

Every program has one row: it writes its rank's part into the inboxes of the others, raises their
flags, waits for its own, and adds the parts in the order of the ranks, so all get the same bits.

Axes: T rows    D numbers of a row    N ranks    R rows an inbox has room for
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options
from sgl.kernels.peer_memory import PeerMemory


@triton.jit
def _reduce_norm_kernel(
    stream,  # [T, D], the sum of `delta` over all ranks is added in place
    delta,  # [T, D], this rank's part
    weight,  # [D] float32
    out,  # [T, D]
    inboxes,  # [N] addresses
    flags,  # [N] addresses
    counts,  # [R]
    eps,
    RANK: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    is_real = d < D
    at = row.to(tl.int64) * D + d
    part = tl.load(delta + at, mask=is_real, other=0.0)
    count = tl.load(counts + row) + 1
    tl.store(counts + row, count)
    first_inbox = (count % 2).to(tl.int64) * N * R * D + at
    number = tl.pointer_type(delta.dtype.element_ty)
    for peer in tl.static_range(N):
        if peer != RANK:
            inbox = tl.load(inboxes + peer).to(number)
            tl.store(inbox + first_inbox + RANK * R * D, part, mask=is_real)
    tl.debug_barrier()  # the whole row is written before one thread raises the flags
    for peer in tl.static_range(N):
        if peer != RANK:
            flag = tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + RANK * R + row
            tl.atomic_xchg(flag, count, sem="release", scope="sys")
    inbox = tl.load(inboxes + RANK).to(number)
    arrived = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + row
    total = tl.zeros([BLOCK_D], tl.float32)
    for peer in tl.static_range(N):
        if peer == RANK:
            total += part.to(tl.float32)
        else:
            while tl.atomic_add(arrived + peer * R, 0, sem="acquire", scope="sys") < count:
                pass
            tl.debug_barrier()
            source = inbox + first_inbox + peer * R * D
            total += tl.load(source, mask=is_real, other=0.0, cache_modifier=".cg").to(tl.float32)
    x = tl.load(stream + at, mask=is_real, other=0.0)
    x = (x.to(tl.float32) + total).to(x.dtype)
    tl.store(stream + at, x, mask=is_real)
    y = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, axis=0) / D + eps)
    w = tl.load(weight + d, mask=is_real, other=0.0)
    tl.store(out + at, (y * scale * w).to(out.dtype.element_ty), mask=is_real)


def reduce_rms_norm(
    stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, peers: PeerMemory
) -> Tensor:
    """Add every rank's `delta_TD` to `stream_TD` in place; returns the norm of the sum."""
    assert stream_TD.is_contiguous(), "rows must lie end to end"
    assert peers.takes(delta_TD), f"{delta_TD.shape} does not fit into the inboxes"
    T, D = stream_TD.shape
    out_TD = torch.empty_like(stream_TD)
    if T:
        block = triton.next_power_of_2(D)
        _reduce_norm_kernel[(T,)](
            stream_TD,
            delta_TD.contiguous(),
            weight_D,
            out_TD,
            peers.inboxes_N,
            peers.flags_N,
            peers.counts_R,
            eps,
            RANK=peers.rank,
            N=peers.size,
            R=peers.max_rows,
            D=D,
            BLOCK_D=block,
            num_warps=min(max(block // 512, 1), 16),
            **launch_options(stream_TD.device),
        )
    return out_TD
