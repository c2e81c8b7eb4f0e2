"""A sum over ranks, its addition to the residual stream and the norm of that, in one kernel.

Every program has one row: it writes its rank's part into the inboxes of the others, raises their
flags, waits for its own, and adds the parts in the order of the ranks, so all get the same bits.
A row's count is raised by one thread, behind a barrier: another would wait for ever if it read it
raised.

Axes: T rows    D numbers of a row    W words of a row    N ranks    R rows an inbox has room for
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options
from sgl.kernels.peer_memory import MAX_WORD_ROWS, PeerMemory


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
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    is_real = d < D
    at = row.to(tl.int64) * D + d
    weight_D = tl.load(weight + d, mask=is_real, other=0.0)
    next_inbox = tl.load(inboxes + (RANK + 1) % N)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    part = tl.load(delta + at, mask=is_real, other=0.0)
    count = tl.load(counts + row) + 1
    first_inbox = (count % 2).to(tl.int64) * N * R * D + at
    number = tl.pointer_type(delta.dtype.element_ty)
    for step in tl.static_range(1, N):
        inbox = next_inbox if step == 1 else tl.load(inboxes + (RANK + step) % N)
        tl.store(inbox.to(number) + first_inbox + RANK * R * D, part, mask=is_real)
    tl.debug_barrier()  # the whole row is written before one thread raises the flags
    tl.store(counts + row, count)  # and every thread has read the count before one raises it
    for step in tl.static_range(1, N):
        flag = tl.load(flags + (RANK + step) % N).to(tl.pointer_type(tl.int32)) + RANK * R + row
        tl.atomic_xchg(flag, count, sem="release", scope="sys")
    x = tl.load(stream + at, mask=is_real, other=0.0)  # on its way while the others' parts are
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
    _add_and_norm(stream, out, x, total, weight_D, at, is_real, eps, D)


@triton.jit
def _reduce_norm_words_kernel(
    stream,  # [T, D]
    delta,  # [T, D] as words of 32 bits: [T, W]
    weight,  # [D] float32
    out,  # [T, D]
    words,  # [N] addresses
    counts,  # [R]
    eps,
    RANK: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    w = tl.arange(0, BLOCK_W)
    is_word = w < W
    d = tl.arange(0, BLOCK_D)
    is_real = d < D
    at_D = row.to(tl.int64) * D + d
    weight_D = tl.load(weight + d, mask=is_real, other=0.0)
    mine = tl.load(words + RANK).to(tl.pointer_type(tl.int64))
    next_inbox = tl.load(words + (RANK + 1) % N)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    count = tl.load(counts + row) + 1
    part = tl.load(delta + row.to(tl.int64) * W + w, mask=is_word, other=0)
    stamp = count.to(tl.int64) << 32
    at = ((count % 2).to(tl.int64) * N * R + row) * W + w
    stamped = stamp | (part.to(tl.int64) & 0xFFFFFFFF)
    for step in tl.static_range(1, N):
        inbox = next_inbox if step == 1 else tl.load(words + (RANK + step) % N)
        tl.store(inbox.to(tl.pointer_type(tl.int64)) + RANK * R * W + at, stamped, mask=is_word)
    x = tl.load(stream + at_D, mask=is_real, other=0.0)  # on its way while the others' parts are
    tl.debug_barrier()  # every thread has read the count before one raises it
    tl.store(counts + row, count)
    number: tl.constexpr = out.dtype.element_ty
    total = tl.zeros([BLOCK_D], tl.float32)
    for peer in tl.static_range(N):
        if peer == RANK:
            total += _numbers(part, number)
        else:
            source = mine + peer * R * W + at
            word = tl.load(source, mask=is_word, other=stamp, volatile=True)
            while tl.min(word >> 32, axis=0) != count:
                word = tl.load(source, mask=is_word, other=stamp, volatile=True)
            total += _numbers(word.to(tl.int32), number)
    _add_and_norm(stream, out, x, total, weight_D, at_D, is_real, eps, D)


@triton.jit
def _numbers(word, number: tl.constexpr):
    """What the words hold, as float32: one number each, or two where numbers have 16 bits."""
    if number.primitive_bitwidth == 32:
        values = word.to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(number, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(number, bitcast=True).to(tl.float32)
        values = tl.interleave(low, high)
    return values


@triton.jit
def _add_and_norm(stream, out, x, total, weight_D, at, is_real, eps, D: tl.constexpr):
    x = (x.to(tl.float32) + total).to(x.dtype)
    tl.store(stream + at, x, mask=is_real)
    y = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, axis=0) / D + eps)
    tl.store(out + at, (y * scale * weight_D).to(out.dtype.element_ty), mask=is_real)


def reduce_rms_norm(
    stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, peers: PeerMemory
) -> Tensor:
    """Add every rank's `delta_TD` to `stream_TD` in place; returns the norm of the sum."""
    assert stream_TD.is_contiguous(), "rows must lie end to end"
    assert peers.takes(delta_TD), f"{delta_TD.shape} does not fit into the inboxes"
    T, D = stream_TD.shape
    out_TD = torch.empty_like(stream_TD)
    if not T:
        return out_TD
    delta_TD = delta_TD.contiguous()
    options = {
        "RANK": peers.rank,
        "N": peers.size,
        "D": D,
        "BLOCK_D": triton.next_power_of_2(D),
        "num_warps": min(max(triton.next_power_of_2(D) // 512, 1), 16),
        **launch_options(stream_TD.device),
    }
    if T <= MAX_WORD_ROWS and peers.row_bytes % 4 == 0:
        num_words = peers.row_bytes // 4
        _reduce_norm_words_kernel[(T,)](
            stream_TD,
            delta_TD.view(torch.int32),
            weight_D,
            out_TD,
            peers.words_N,
            peers.word_counts_R,
            eps,
            R=MAX_WORD_ROWS,
            W=num_words,
            BLOCK_W=options["BLOCK_D"] * delta_TD.itemsize // 4,
            **options,
        )
    else:
        _reduce_norm_kernel[(T,)](
            stream_TD,
            delta_TD,
            weight_D,
            out_TD,
            peers.inboxes_N,
            peers.flags_N,
            peers.counts_R,
            eps,
            R=peers.max_rows,
            **options,
        )
    return out_TD
