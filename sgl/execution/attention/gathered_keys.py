"""Keys and values of decoding requests, gathered once and then added to, step by step.

Gathering the pages of a batch anew in every step costs half as much as the attention itself. As
long as the same requests decode together, a dense copy only needs the new token of each.

Axes: b requests    K key/value heads    C capacity in tokens    L tokens in it    E head size
      S slots of the cache
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

SPARE_TOKENS = 64


@dataclass(slots=True)
class GatheredKeys:
    """The copy for one group of requests.

    owners   row of each request and the how-manieth of the row it is: from one step to the next the
             same row may become another request's
    window   of the layers whose keys these are
    skip     tokens at the start that are left out, attended to elsewhere
    lens_b   tokens in the copy
    slots_bL slots of all of them; None once there is a copy, which needs only `newest_b`
    """

    owners: list[tuple[int, int]]
    window: int | None
    skip: int
    lens_b: np.ndarray
    newest_b: Tensor
    slots_bL: Tensor | None
    capacity: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def follows(self, other: GatheredKeys) -> bool:
        """Whether this is one step after `other` and fits into its copy."""
        return (
            self.owners == other.owners
            and self.window == other.window
            and self.skip == other.skip
            and bool((self.lens_b == other.lens_b + 1).all())
            and int(self.lens_b.max()) <= other.capacity
        )

    def take_over(self, other: GatheredKeys) -> None:
        """Go on with the copy of the step before."""
        self.capacity, self.layers, self.slots_bL = other.capacity, other.layers, None

    def read(self, layer_id: int, *caches_SKE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [b, K, L, E]; the newest are in the cache already."""
        if self.slots_bL is not None:
            keys, values = (self._gather(cache_SKE, self.slots_bL) for cache_SKE in caches_SKE)
            self.layers[layer_id] = keys, values
        else:
            requests_b = torch.arange(len(self.owners))
            positions_b = torch.from_numpy(self.lens_b - 1)
            for copy_bKCE, cache_SKE in zip(self.layers[layer_id], caches_SKE, strict=True):
                copy_bKCE[requests_b, :, positions_b] = cache_SKE[self.newest_b]
        num_keys = int(self.lens_b.max())
        keys, values = self.layers[layer_id]
        return keys[:, :, :num_keys], values[:, :, :num_keys]

    def _gather(self, cache_SKE: Tensor, slots_bL: Tensor) -> Tensor:
        (b, num_keys), (_, K, E) = slots_bL.shape, cache_SKE.shape
        copy_bKCE = cache_SKE.new_zeros(b, K, self.capacity, E)
        gathered = cache_SKE.index_select(0, slots_bL.flatten()).view(b, num_keys, K, E)
        copy_bKCE[:, :, :num_keys] = gathered.transpose(1, 2)
        return copy_bKCE
