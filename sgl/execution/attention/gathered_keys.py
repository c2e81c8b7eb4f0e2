"""Keys and values of decoding requests, gathered once and then added to, step by step.

Gathering the pages of a batch anew in every step costs half as much as the attention itself. From
one step to the next most requests stay: a dense copy of their keys only needs the new token of
each. Where one leaves, the last of the copy takes its place; one that joins is gathered alone.

Axes: b requests    K key/value heads    C capacity in tokens    L tokens in it    E head size
      j requests that join    S slots of the cache
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

SPARE_TOKENS = 64
SPARE_REQUESTS = 2

Owner: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Room:
    """What a copy has memory for; made anew, it costs many steps."""

    num_requests: int
    num_tokens: int  # of each

    @classmethod
    def around(cls, num_requests: int, num_tokens: int) -> Room:
        return cls(num_requests + num_requests // 2 + SPARE_REQUESTS, num_tokens * 2 + SPARE_TOKENS)

    def suits(self, num_requests: int, num_tokens: int) -> bool:
        """Whether so much fits, and is not far too little."""
        is_enough = num_requests <= self.num_requests and num_tokens <= self.num_tokens
        most = Room.around(2 * num_requests, 2 * num_tokens)
        return is_enough and self.size <= most.size

    @property
    def size(self) -> int:
        """In tokens."""
        return self.num_requests * self.num_tokens


@dataclass(frozen=True, slots=True)
class Members:
    """The requests of a copy at one step, in its order.

    owners   row of each request and the how-manieth of the row it is: from one step to the next the
             same row may become another request's
    lens_b   tokens of each in the copy
    """

    owners: Sequence[Owner]
    lens_b: np.ndarray


NOBODY = Members((), np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class Changes:
    """How the members of one step come from those of the step before.

    order    which of the wanted requests is where in the copy
    moves    places in the copy: from, to
    joined   places of those that were not there
    """

    order: np.ndarray
    moves: list[tuple[int, int]]
    joined: np.ndarray

    @classmethod
    def between(cls, before: Members, wanted: Members) -> Changes:
        """Those who stay keep their places, as far as these are among the first b."""
        num = len(wanted.owners)
        order = np.full(num, -1)
        places = {owner: place for place, owner in enumerate(before.owners)}
        movers, joiners = [], []
        for index, owner in enumerate(wanted.owners):
            place = places.get(owner)
            if place is None or before.lens_b[place] + 1 != wanted.lens_b[index]:
                joiners.append(index)
            elif place < num:
                order[place] = index
            else:
                movers.append((place, index))
        free = np.flatnonzero(order < 0)
        moves = [(place, int(to)) for (place, _), to in zip(movers, free, strict=False)]
        order[free] = [index for _, index in movers] + joiners
        return cls(order, moves, free[len(movers) :])


@dataclass(slots=True)
class GatheredKeys:
    """The copy for one group of requests, at one step.

    window   of the layers whose keys these are
    skip     tokens at the start that are left out, attended to elsewhere
    newest_b slots of the newest token of each
    joined_jL slots of all tokens of those that join
    """

    members: Members
    changes: Changes
    room: Room
    window: int | None
    skip: int
    newest_b: Tensor
    joined_jL: Tensor | None
    layers: dict[int, list[Tensor]] = field(default_factory=dict)

    def read(self, layer_id: int, *caches_SKE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [b, K, L, E]; the newest are in the cache already."""
        if layer_id not in self.layers:
            self.layers[layer_id] = [self._empty(cache_SKE) for cache_SKE in caches_SKE]
        copies = self.layers[layer_id]
        num_requests, num_keys = len(self.members.owners), int(self.members.lens_b.max())
        for copy_bKCE, cache_SKE in zip(copies, caches_SKE, strict=True):
            self._update(copy_bKCE, cache_SKE)
        keys, values = (copy_bKCE[:num_requests, :, :num_keys] for copy_bKCE in copies)
        return keys, values

    def _empty(self, cache_SKE: Tensor) -> Tensor:
        """Zeros: what is masked must still be a number."""
        _, K, E = cache_SKE.shape
        return cache_SKE.new_zeros(self.room.num_requests, K, self.room.num_tokens, E)

    def _update(self, copy_bKCE: Tensor, cache_SKE: Tensor) -> None:
        lens_b = self.members.lens_b
        for place, to in self.changes.moves:
            num_tokens = int(lens_b[to])
            copy_bKCE[to, :, :num_tokens] = copy_bKCE[place, :, :num_tokens]
        requests_b, positions_b = torch.arange(len(lens_b)), torch.from_numpy(lens_b - 1)
        copy_bKCE[requests_b, :, positions_b] = cache_SKE[self.newest_b]
        if self.joined_jL is not None:
            for slots_L, place in zip(self.joined_jL, self.changes.joined.tolist(), strict=True):
                num_tokens = int(lens_b[place])
                keys_LKE = cache_SKE.index_select(0, slots_L[:num_tokens])
                copy_bKCE[place, :, :num_tokens] = keys_LKE.transpose(0, 1)
