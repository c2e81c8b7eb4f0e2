"""Which requests of a step share the pages of a long prefix, so that it is read once for all.

A wave of requests with a common prompt spends most of its attention on reading the same KV again
and again. Where enough reading is saved, the prefix is attended to once with the queries of all
(cascade attention: https://flashinfer.ai/2024/02/02/cascade-inference.html).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_SAVED_TOKENS = 2048  # fewer are not worth a second call and a merge in every layer
MAX_DEPTH = 16  # prefixes within prefixes that are told apart: each costs a look at all pages


@dataclass(frozen=True, slots=True)
class Cluster:
    """Requests (indices into the step's B) and how many leading tokens they share."""

    members: np.ndarray
    shared_len: int

    @property
    def num_saved(self) -> int:
        return (len(self.members) - 1) * self.shared_len


def find_clusters(
    pages_BP: np.ndarray, starts_B: np.ndarray, page_size: int, min_saved: int = MIN_SAVED_TOKENS
) -> list[Cluster]:
    """Split the B requests into clusters; those that share too little stand in one with length 0.

    pages_BP  page table rows            starts_B  tokens each had before this step: the shared
                                                   part ends before any query
    """
    if len(starts_B) < 2 or starts_B.sum() < min_saved:
        return [Cluster(np.arange(len(starts_B)), 0)]
    shared = [
        cluster
        for cluster in _best(np.arange(len(starts_B)), 0, pages_BP, starts_B // page_size)
        if cluster.num_saved * page_size >= min_saved
    ]
    taken = np.zeros(len(starts_B), bool)
    for cluster in shared:
        taken[cluster.members] = True
    clusters = [Cluster(one.members, one.shared_len * page_size) for one in shared]
    if not taken.all():
        clusters.append(Cluster(np.flatnonzero(~taken), 0))
    return clusters


def _best(
    members: np.ndarray,
    first_page: int,
    pages_BP: np.ndarray,
    num_pages_B: np.ndarray,
    depth: int = 0,
) -> list[Cluster]:
    """The members as one cluster, or divided where they diverge: whatever saves more.

    Lengths are in pages; all members agree on the pages before `first_page`.
    """
    if len(members) < 2:
        return []
    last = int(num_pages_B[members].min())
    pages = pages_BP[members, first_page:last]
    differs = (pages != pages[0]).any(axis=0)
    shared = first_page + (int(differs.argmax()) if differs.any() else len(differs))
    whole = Cluster(members, shared)
    longer = members[num_pages_B[members] > shared]
    if not len(longer) or depth == MAX_DEPTH:
        return [whole]
    branches = pages_BP[longer, shared]
    parts = [
        cluster
        for page in np.unique(branches)
        for cluster in _best(longer[branches == page], shared + 1, pages_BP, num_pages_B, depth + 1)
    ]
    return parts if sum(part.num_saved for part in parts) > whole.num_saved else [whole]
