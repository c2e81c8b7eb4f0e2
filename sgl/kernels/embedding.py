"""Rows of an embedding table, of which this rank holds some.

Axes: T tokens    D numbers of a row    V rows of the whole table
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embed(token_ids_T: Tensor, table_VD: Tensor, first: int, num: int, total: int) -> Tensor:
    """The row of each token [T, D]; zeros for ids not in first … first + num, which others hold.

    total  rows that all ranks hold together
    """
    if token_ids_T.device.type == "cuda":
        from sgl.kernels import triton_embedding

        return triton_embedding.embed(token_ids_T, table_VD, first, num)
    if num == total:
        return F.embedding(token_ids_T, table_VD)
    return embed_reference(token_ids_T, table_VD, first, num)


def embed_reference(token_ids_T: Tensor, table_VD: Tensor, first: int, num: int) -> Tensor:
    local_ids_T = token_ids_T - first
    is_elsewhere_T = (local_ids_T < 0) | (local_ids_T >= num)
    x_TD = F.embedding(local_ids_T.masked_fill(is_elsewhere_T, 0), table_VD)
    return x_TD.masked_fill_(is_elsewhere_T[:, None], 0.0)
