"""One row times a matrix in Triton: nothing but reading the weight, as fast as memory gives it.

What comes next needs two outputs at once where it is the gate of a SwiGLU, or a word for the other
ranks of a sum: there a program has two rows of the weight, and does it in passing.

Axes: I inputs    O outputs    F gates, half of the outputs    N ranks
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl.kernels.pdl import launch_options
from sgl.kernels.peer_memory import MAX_WORD_ROWS, PeerMemory


@triton.jit
def _gemv_kernel(
    x,  # [I]
    weight,  # [O, I]
    out,  # [O]
    O,
    I,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    tile = weight + o.to(tl.int64)[:, None] * I + i[None, :]
    w_OI = tl.load(tile, mask=(o < O)[:, None] & (i < I)[None, :], other=0.0)
    if USE_PDL:  # weights never change: their first part is on its way while `x` is computed
        tl.extra.cuda.gdc_wait()
    acc_OI = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, I, BLOCK_I):
        following = start + BLOCK_I + i
        is_real = (o < O)[:, None] & (following < I)[None, :]
        next_w_OI = tl.load(tile + (start + BLOCK_I), mask=is_real, other=0.0)
        x_I = tl.load(x + start + i, mask=start + i < I, other=0.0).to(tl.float32)
        acc_OI += w_OI.to(tl.float32) * x_I[None, :]
        w_OI = next_w_OI
    y_O = tl.sum(acc_OI, axis=1)
    tl.store(out + o, y_O.to(out.dtype.element_ty), mask=o < O)


def gemv(
    x_1I: Tensor,
    weight_OI: Tensor,
    dtype: torch.dtype,
    *,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """x @ weight.T: [1, O] in `dtype`.

    tile  outputs and inputs that a program holds, and its warps; measured on an H200: few outputs
          and long rows are best for all layers of models with 1 and 8 billion weights
    """
    O, I = weight_OI.shape
    block_o, block_i, num_warps = tile or ((2, 2048, 2) if I >= 4096 else (2, 1024, 4))
    out_1O = torch.empty((1, O), dtype=dtype, device=x_1I.device)
    _gemv_kernel[(triton.cdiv(O, block_o),)](
        x_1I,
        weight_OI,
        out_1O,
        O,
        I,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=num_warps,
        **launch_options(x_1I.device),
    )
    return out_1O


@triton.jit
def _gated_gemv_kernel(
    x,  # [I]
    weight,  # [2F, I]
    out,  # [F]
    F,
    I,
    BLOCK_I: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    f = tl.program_id(0)
    gate_at = weight + f.to(tl.int64) * I
    gate, up = _two_outputs(x, gate_at, gate_at + F.to(tl.int64) * I, I, BLOCK_I, USE_PDL)
    tl.store(out + f, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty))


@triton.jit
def _sent_gemv_kernel(
    x,  # [I]
    weight,  # [O, I]
    out,  # [O]
    words,  # [N] addresses of the ranks' words
    counts,  # [R]
    O,
    I,
    RANK: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w, W = tl.program_id(0), O // 2
    next_inbox = tl.load(words + (RANK + 1) % N)
    at = weight + w.to(tl.int64) * 2 * I
    low, high = _two_outputs(x, at, at + I, I, BLOCK_I, USE_PDL)
    number: tl.constexpr = out.dtype.element_ty
    low, high = low.to(number), high.to(number)
    tl.store(out + 2 * w, low)
    tl.store(out + 2 * w + 1, high)
    # as _reduce_norm_words_kernel reads them; it raises the count when all have come
    count = tl.load(counts) + 1
    low_bits = low.to(tl.uint16, bitcast=True).to(tl.int64)
    high_bits = high.to(tl.uint16, bitcast=True).to(tl.int64)
    stamped = count.to(tl.int64) << 32 | high_bits << 16 | low_bits
    place = ((count % 2).to(tl.int64) * N + RANK) * R * W + w
    for step in tl.static_range(1, N):
        inbox = next_inbox if step == 1 else tl.load(words + (RANK + step) % N)
        tl.store(inbox.to(tl.pointer_type(tl.int64)) + place, stamped)


@triton.jit
def _two_outputs(x, first, second, I, BLOCK_I: tl.constexpr, USE_PDL: tl.constexpr):
    """The products of `x` with two rows of the weight."""
    i = tl.arange(0, BLOCK_I)
    w_I = tl.load(first + i, mask=i < I, other=0.0)
    v_I = tl.load(second + i, mask=i < I, other=0.0)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    first_I = tl.zeros([BLOCK_I], tl.float32)
    second_I = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, I, BLOCK_I):
        following = start + BLOCK_I + i
        next_w_I = tl.load(first + following, mask=following < I, other=0.0)
        next_v_I = tl.load(second + following, mask=following < I, other=0.0)
        x_I = tl.load(x + start + i, mask=start + i < I, other=0.0).to(tl.float32)
        first_I += w_I.to(tl.float32) * x_I
        second_I += v_I.to(tl.float32) * x_I
        w_I = next_w_I
        v_I = next_v_I
    return tl.reduce((first_I, second_I), 0, _add_both)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


def gated_gemv(x_1I: Tensor, weight_OI: Tensor, *, tile: tuple[int, int] | None = None) -> Tensor:
    """silu(y[:, :F]) * y[:, F:] of y = x @ weight.T: [1, F].

    tile  inputs that a program holds, and its warps
    """
    O, I = weight_OI.shape
    assert O % 2 == 0, f"{O} outputs cannot be halved"
    block_i, num_warps = tile or _pair_tile(I)
    out_1F = torch.empty((1, O // 2), dtype=x_1I.dtype, device=x_1I.device)
    _gated_gemv_kernel[(O // 2,)](
        x_1I,
        weight_OI,
        out_1F,
        O // 2,
        I,
        BLOCK_I=block_i,
        num_warps=num_warps,
        **launch_options(x_1I.device),
    )
    return out_1F


def sent_gemv(
    x_1I: Tensor, weight_OI: Tensor, peers: PeerMemory, *, tile: tuple[int, int] | None = None
) -> Tensor:
    """x @ weight.T: [1, O], of which every word goes to the other ranks as soon as it is there.

    Numbers of 16 bits. The sum (`triton_reduce_norm`) must be the next that the ranks exchange.
    """
    O, I = weight_OI.shape
    assert O * x_1I.itemsize == peers.row_bytes, f"{O} outputs do not fill a row of the inboxes"
    assert x_1I.itemsize == 2, f"a word holds two numbers of 16 bits, not {x_1I.dtype}"
    assert O % 2 == 0, f"{O} outputs do not fill words"
    block_i, num_warps = tile or _pair_tile(I)
    out_1O = torch.empty((1, O), dtype=x_1I.dtype, device=x_1I.device)
    _sent_gemv_kernel[(O // 2,)](
        x_1I,
        weight_OI,
        out_1O,
        peers.words_N,
        peers.word_counts_R,
        O,
        I,
        RANK=peers.rank,
        N=peers.size,
        R=MAX_WORD_ROWS,
        BLOCK_I=block_i,
        num_warps=num_warps,
        **launch_options(x_1I.device),
    )
    return out_1O


def _pair_tile(num_inputs: int) -> tuple[int, int]:
    """Inputs and warps: measured as those of `gemv`, for the same layers."""
    return (2048, 2) if num_inputs >= 4096 else (1024, 2)
