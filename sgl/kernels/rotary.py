"""Rotary positions: every pair (x[i], x[i + E/2]) of a head turns by its position's i-th angle.

    y[i]       = x[i]       * cos - x[i + E/2] * sin
    y[i + E/2] = x[i + E/2] * cos + x[i]       * sin

Axes: T tokens    N heads    E head size. The first half of the sines is negated, so both lines
above are x * cos + swap_halves(x) * sin.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions_T: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, [T, 1, E] in float32, for `rotate`."""
    assert frequencies_R.dtype == torch.float32, "16 bits cannot tell large angles apart"
    signed_E = torch.cat((-frequencies_R, frequencies_R))
    angles_T1E = positions_T[:, None, None] * signed_E
    return angles_T1E.cos(), angles_T1E.sin()


def rotate_and_store(
    qkv_TNE: Tensor,
    cos_T1E: Tensor,
    sin_T1E: Tensor,
    keys_SKE: Tensor,
    values_SKE: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Turn queries and keys; store keys and values in the cache; returns the queries [T, H, E].

    qkv_TNE  the heads of queries, keys and values side by side, N = H + 2K; overwritten
    slots_T  where in the cache [S, K, E] each token goes
    """
    num_kv_heads = keys_SKE.shape[1]
    num_turned = qkv_TNE.shape[1] - num_kv_heads
    if qkv_TNE.device.type == "cuda":
        from sgl.kernels import triton_rotary

        triton_rotary.rotate_and_store(qkv_TNE, cos_T1E, sin_T1E, keys_SKE, values_SKE, slots_T)
    else:
        rotate(qkv_TNE[:, :num_turned], cos_T1E, sin_T1E)
        _store(keys_SKE, slots_T, qkv_TNE[:, num_turned - num_kv_heads : num_turned])
        _store(values_SKE, slots_T, qkv_TNE[:, num_turned:])
    return qkv_TNE[:, : num_turned - num_kv_heads]


def _store(cache_SKE: Tensor, slots_T: Tensor, x_TKE: Tensor) -> None:
    """Numbers that 8 bits cannot hold become the largest that they can."""
    if cache_SKE.itemsize > 1:
        cache_SKE.index_copy_(0, slots_T, x_TKE)
    else:
        limit = torch.finfo(cache_SKE.dtype).max
        narrow_TKE = x_TKE.clamp(-limit, limit).to(cache_SKE.dtype)
        cache_SKE.view(torch.uint8).index_copy_(0, slots_T, narrow_TKE.view(torch.uint8))


def rotate(x_TNE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> None:
    """Turn all heads of `x_TNE` in place, computing in float32."""
    assert x_TNE.shape[::2] == cos_T1E.shape[::2] == sin_T1E.shape[::2], (
        f"{x_TNE.shape} does not go with angles {cos_T1E.shape}, {sin_T1E.shape}"
    )
    x_TNE.copy_(rotate_reference(x_TNE, cos_T1E, sin_T1E))


def rotate_reference(x_TNE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    y_TNE = x_TNE.to(torch.float32, copy=True)
    turned_TNE = y_TNE.roll(y_TNE.shape[-1] // 2, dims=-1).mul_(sin_T1E)
    return y_TNE.mul_(cos_T1E).add_(turned_TNE)
