"""In which order waiting requests are considered for admission. Pure functions, no clock."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from sgl.scheduling.radix_cache import Node, RadixCache
from sgl.scheduling.request import Request

Policy: TypeAlias = Literal["lpm", "fcfs", "dfs-weight", "random"]

WINDOW = 128  # only so many of the oldest requests are compared: matching all would cost a step
MAX_OVERTAKEN = 32  # admissions that may pass a request before it goes first


def order(
    waiting: Sequence[Request], policy: Policy, cache: RadixCache, rng: random.Random
) -> list[Request]:
    """The oldest `WINDOW` requests, best first.

    Retracted requests come before all others, then those overtaken too often (nothing starves),
    then the rest: by longest cached prefix (lpm), by arrival (fcfs), by depth-first walk of the
    radix tree with the most wanted branch first (dfs-weight), or shuffled (random).
    """
    window = list(waiting[:WINDOW])
    rank = _RANKS[policy](window, cache, rng)
    return sorted(window, key=lambda request: (_urgency(request), rank(request), request.arrival))


def _urgency(request: Request) -> int:
    if request.num_retractions:
        return 0
    return 1 if request.num_overtaken >= MAX_OVERTAKEN else 2


Rank: TypeAlias = Callable[[Request], tuple[object, ...]]


def _by_prefix(window: list[Request], cache: RadixCache, rng: random.Random) -> Rank:
    def rank(request: Request) -> tuple[object, ...]:
        length = cache.match_len(request.token_ids, request.namespace, request.cache_limit)
        return (-length,)

    return rank


def _by_arrival(window: list[Request], cache: RadixCache, rng: random.Random) -> Rank:
    return lambda request: ()


def _by_chance(window: list[Request], cache: RadixCache, rng: random.Random) -> Rank:
    return lambda request: (rng.random(),)


def _by_branch(window: list[Request], cache: RadixCache, rng: random.Random) -> Rank:
    paths = {
        request.request_id: _path(
            cache.find(request.token_ids, request.namespace, request.cache_limit)
        )
        for request in window
    }
    weights = Counter(node for path in paths.values() for node in path)
    order_of = {node: position for position, node in enumerate(weights)}

    def rank(request: Request) -> tuple[object, ...]:
        steps = [(-weights[node], order_of[node]) for node in paths[request.request_id]]
        return (*steps, _AFTER_CHILDREN)

    return rank


_AFTER_CHILDREN = (1, 0)  # sorts after every (-weight, position): a node's branches go before it


def _path(node: Node) -> list[Node]:
    """Nodes from the root's child down to `node`."""
    path = []
    walk: Node | None = node
    while walk is not None and walk.parent is not None:
        path.append(walk)
        walk = walk.parent
    return path[::-1]


_RANKS: dict[Policy, Callable[[list[Request], RadixCache, random.Random], Rank]] = {
    "lpm": _by_prefix,
    "fcfs": _by_arrival,
    "random": _by_chance,
    "dfs-weight": _by_branch,
}
