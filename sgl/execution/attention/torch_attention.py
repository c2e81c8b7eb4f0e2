"""Attention in plain torch: the reference on a GPU, and what the CPU runs.

A step's requests are put into pieces of similar shape; each piece is one padded call per layer.
The query heads of a KV head stand as further queries of it, so grouped-query attention needs no
copy of keys and values. A prefix that many requests share is a piece of its own.

Axes: T tokens    H query heads    K key/value heads    G = H / K    E head size
      b sequences of a piece    Q queries of each, padded    L keys of each, padded
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sgl.execution.attention.gathered_keys import NOBODY, Changes, GatheredKeys, Members, Room
from sgl.execution.attention.shared_prefix import Cluster, find_clusters
from sgl.execution.kv_cache import KvCache
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import Outputs, StepLayout
from sgl.kernels.attention import (
    MASK_ALIGNMENT,
    attention,
    attention_with_lse,
    merge_attention,
)
from sgl.models.batch import AttentionSpec

MAX_COPIED_BYTES = 1 << 30  # of keys and values of decodes, on a CPU


@dataclass(frozen=True, slots=True)
class Piece:
    """One padded attention call.

    tokens     which of the T tokens the b * Q queries are (padding repeats the last of its
               sequence); None: all of them, in order
    keys       where the b * K * L keys are among the S * K heads of the cache, so that those of a
               head are gathered end to end; or the slots, where they lie end to end; or a copy
    mask       added to the scores, [b, 1, G * Q, L]; None if every query sees every key
    valid      which of the b * Q queries are no padding; None: all
    prefix     the piece with the keys before these, if they are shared with other requests
    """

    tokens: Tensor | None
    keys: Tensor | slice | GatheredKeys
    mask: Tensor | None
    valid: Tensor | None
    shape: tuple[int, int, int]
    prefix: Piece | None = None


class TorchAttention:
    """An `AttentionBackend`."""

    def __init__(self, layers: list[AttentionSpec], cache: KvCache) -> None:
        self.layers = layers
        self.cache = cache
        self.windows = {spec.window for spec in layers}
        self.group_size = layers[0].num_heads // layers[0].num_kv_heads
        self.pieces: dict[int | None, list[Piece]] = {}
        self.copies: list[GatheredKeys] = []

    def plan(self, layout: StepLayout, table: RequestTable, inputs_4T: Tensor) -> None:
        """Divide the step into pieces, for each window that a layer has."""
        planner = _Planner(layout, table, self.cache, self.group_size, self.copies)
        self.pieces = {window: list(planner.pieces(window)) for window in self.windows}
        self.copies = planner.copies

    def run(self, layer_id: int, q_THE: Tensor) -> Tensor:
        """[T, H, E] -> [T, H, E]."""
        pieces = self.pieces[self.layers[layer_id].window]
        if pieces[0].tokens is None:
            return self._attend(layer_id, pieces[0], q_THE)
        o_THE = torch.empty_like(q_THE)
        for piece in pieces:
            assert piece.tokens is not None
            o_nHE, tokens_n = self._attend(layer_id, piece, q_THE), piece.tokens
            if piece.valid is not None:
                o_nHE, tokens_n = o_nHE[piece.valid], tokens_n[piece.valid]
            o_THE.index_copy_(0, tokens_n, o_nHE)
        return o_THE

    def run_outputs(self, layer_id: int, q_THE: Tensor, outputs: Outputs) -> Tensor:
        return self.run(layer_id, q_THE).index_select(0, outputs.tokens_W)

    def _attend(self, layer_id: int, piece: Piece, q_THE: Tensor) -> Tensor:
        """The piece's outputs [b * Q, H, E]."""
        spec = self.layers[layer_id]
        if piece.prefix is not None:
            return self._attend_in_two(layer_id, piece, piece.prefix, q_THE)
        o_bKQE = attention(*self._inputs(layer_id, piece, q_THE), spec.scale, spec.soft_cap)
        return _join_heads(o_bKQE, piece.shape)

    def _attend_in_two(self, layer_id: int, piece: Piece, prefix: Piece, q_THE: Tensor) -> Tensor:
        """Attend to a shared prefix once for all of the piece's queries, to the rest one by one."""
        spec = self.layers[layer_id]
        parts = []
        for part in (prefix, piece):
            o, lse = attention_with_lse(
                *self._inputs(layer_id, part, q_THE), spec.scale, spec.soft_cap
            )
            parts += [_join_heads(o, part.shape), _join_heads(lse.unsqueeze(-1), part.shape)]
        o1, lse1, o2, lse2 = parts
        return merge_attention(o1, lse1.squeeze(-1), o2, lse2.squeeze(-1))

    def _inputs(
        self, layer_id: int, piece: Piece, q_THE: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        b, num_queries, _ = piece.shape
        keys, values = self.cache.keys_SKE[layer_id], self.cache.values_SKE[layer_id]
        K, E = keys.shape[1:]
        q = q_THE if piece.tokens is None else q_THE.index_select(0, piece.tokens)
        q_bKGQE = q.view(b, num_queries, K, -1, E).permute(0, 2, 3, 1, 4)
        if isinstance(piece.keys, GatheredKeys):
            k_bKLE, v_bKLE = piece.keys.read(layer_id, keys, values)
        else:
            k_bKLE, v_bKLE = (_read(cache, piece.keys, piece.shape) for cache in (keys, values))
        k_bKLE, v_bKLE = k_bKLE.to(q.dtype), v_bKLE.to(q.dtype)
        return q_bKGQE.reshape(b, K, -1, E), k_bKLE, v_bKLE, piece.mask


def _read(cache_SKE: Tensor, where: Tensor | slice, shape: tuple[int, int, int]) -> Tensor:
    """Keys or values of a piece: [b, K, L, E]."""
    _, K, E = cache_SKE.shape
    if isinstance(where, slice):
        return cache_SKE[where].transpose(0, 1).unsqueeze(0)
    return cache_SKE.view(-1, E).index_select(0, where).view(shape[0], K, shape[2], E)


def _join_heads(x_bKQE: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """[b, K, G * Q, E] -> [b * Q, H, E]."""
    b, num_queries, _ = shape
    K, E = x_bKQE.shape[1], x_bKQE.shape[3]
    x_bKGQE = x_bKQE.view(b, K, -1, num_queries, E)
    return x_bKGQE.permute(0, 3, 1, 2, 4).reshape(b * num_queries, -1, E)


class _Planner:
    """Turns a step's layout into pieces."""

    def __init__(
        self,
        layout: StepLayout,
        table: RequestTable,
        cache: KvCache,
        group_size: int,
        copies: list[GatheredKeys],
    ) -> None:
        self.layout = layout
        self.table = table
        self.page_size = cache.page_size
        self.num_heads = cache.keys_SKE[0].shape[1]
        self.dtype = cache.model_dtype
        self.group_size = group_size
        self.last_copies = list(copies)
        self.copies: list[GatheredKeys] = []
        self.copied_tokens_left = self._max_copied_tokens(cache)
        self.num_tokens = layout.num_tokens
        self.starts_B = layout.kv_lens_B - layout.query_lens_B
        self.firsts_B = layout.token_ends - layout.query_lens_B

    def pieces(self, window: int | None) -> Iterator[Piece]:
        for cluster in self._clusters(window):
            prefixes = cluster.shared_len > 0
            for members in _similar(self.layout, cluster):
                copy = self._copy(members, cluster.shared_len, window)
                ordered = members if copy is None else members[copy.changes.order]
                prefix = self._prefix_piece(ordered, cluster.shared_len) if prefixes else None
                yield self._piece(ordered, cluster.shared_len, window, prefix, copy)

    def _clusters(self, window: int | None) -> list[Cluster]:
        if window is not None:
            return [Cluster(np.arange(len(self.starts_B)), 0)]
        pages_BP = self.table.pages_RP[self.layout.rows_B, : int(self.starts_B.max(initial=0))]
        return find_clusters(pages_BP, self.starts_B, self.page_size)

    def _piece(
        self,
        members: np.ndarray,
        skip: int,
        window: int | None,
        prefix: Piece | None,
        copy: GatheredKeys | None,
    ) -> Piece:
        """Attention of the members to their keys from position `skip` on."""
        query_lens = self.layout.query_lens_B[members]
        num_keys = int(self.layout.kv_lens_B[members].max()) - skip
        offsets_bQ = np.minimum(np.arange(query_lens.max()), query_lens[:, None] - 1)
        seen_bQ = self.starts_B[members][:, None] + offsets_bQ - skip  # last key a query sees
        is_real_bQ = np.arange(query_lens.max()) < query_lens[:, None]
        valid = None if is_real_bQ.all() else self.table.to_device(np.flatnonzero(is_real_bQ))
        return Piece(
            tokens=self._tokens(members, offsets_bQ),
            keys=copy or self._keys(members, skip, num_keys),
            mask=self._mask(seen_bQ, num_keys, window),
            valid=valid,
            shape=(*offsets_bQ.shape, num_keys),
            prefix=prefix,
        )

    def _prefix_piece(self, members: np.ndarray, shared_len: int) -> Piece:
        """Attention of all (padded) queries of the members to the prefix they share."""
        query_lens = self.layout.query_lens_B[members]
        offsets_bQ = np.minimum(np.arange(query_lens.max()), query_lens[:, None] - 1)
        return Piece(
            tokens=self._tokens(members, offsets_bQ),
            keys=self._keys(members[:1], 0, shared_len),
            mask=None,
            valid=None,
            shape=(1, offsets_bQ.size, shared_len),
        )

    def _tokens(self, members: np.ndarray, offsets_bQ: np.ndarray) -> Tensor | None:
        tokens = (self.firsts_B[members][:, None] + offsets_bQ).flatten()
        if len(tokens) == self.num_tokens and (np.diff(tokens) == 1).all():
            return None
        return self.table.to_device(tokens)

    def _copy(self, members: np.ndarray, skip: int, window: int | None) -> GatheredKeys | None:
        """A copy of the keys of several decodes; None where it would not pay or be too large."""
        if len(members) == 1 or (self.layout.query_lens_B[members] != 1).any():
            return None
        table, rows_b = self.table, self.layout.rows_B[members]
        lens_b = self.layout.kv_lens_B[members] - skip
        owners = list(zip(rows_b.tolist(), table.num_owners_R[rows_b].tolist(), strict=True))
        wanted = Members(owners, lens_b)
        last = self._take_last(wanted, skip, window)
        room = last.room if last else Room.around(len(rows_b), int(lens_b.max()))
        if room.size > self.copied_tokens_left:
            return None
        self.copied_tokens_left -= room.size
        changes = Changes.between(last.members if last else NOBODY, wanted)
        rows_b, lens_b = rows_b[changes.order], lens_b[changes.order]
        newest_b = skip + lens_b - 1
        pages_b = table.pages_RP[rows_b, newest_b // self.page_size]
        joined_j = changes.joined
        copy = GatheredKeys(
            members=Members([owners[index] for index in changes.order], lens_b),
            changes=changes,
            room=room,
            window=window,
            skip=skip,
            newest_b=table.to_device(pages_b * self.page_size + newest_b % self.page_size),
            joined_jL=self._slots(rows_b[joined_j], skip, int(lens_b[joined_j].max()))
            if len(joined_j)
            else None,
            layers=last.layers if last else {},
        )
        self.copies.append(copy)
        return copy

    def _take_last(self, wanted: Members, skip: int, window: int | None) -> GatheredKeys | None:
        """The copy of the step before to go on with: the one with the most of the requests."""
        num_tokens = int(wanted.lens_b.max())
        owners = set(wanted.owners)
        best, most = None, 0
        for last in self.last_copies:
            num_common = len(owners.intersection(last.members.owners))
            is_alike = last.window == window and last.skip == skip
            if is_alike and num_common > most and last.room.suits(len(owners), num_tokens):
                best, most = last, num_common
        if best:
            self.last_copies.remove(best)
        return best

    def _max_copied_tokens(self, cache: KvCache) -> int:
        """On a GPU none: there, memory is counted and gathering is fast."""
        keys_SKE = cache.keys_SKE[0]
        if keys_SKE.device.type != "cpu":
            return 0
        bytes_per_token = 2 * len(cache.keys_SKE) * keys_SKE[0].numel() * keys_SKE.itemsize
        return MAX_COPIED_BYTES // bytes_per_token

    def _keys(self, members: np.ndarray, skip: int, num_keys: int) -> Tensor | slice:
        """Where positions skip … skip + num_keys of each member are, for `Piece.keys`."""
        rows, size = self.layout.rows_B[members], self.page_size
        first, last = skip // size, -(-(skip + num_keys) // size)
        if len(rows) == 1:
            pages = self.table.pages_RP[rows[0], first:last]
            if (np.diff(pages) == 1).all():
                return slice(int(pages[0]) * size, int(pages[0]) * size + num_keys)
        slots_bL = self._slots(rows, skip, num_keys)
        heads_K1 = torch.arange(self.num_heads, device=slots_bL.device).unsqueeze(1)
        return (slots_bL.unsqueeze(1) * self.num_heads + heads_K1).flatten()

    def _slots(self, rows: np.ndarray, skip: int, num_keys: int) -> Tensor:
        """Slots of positions skip … skip + num_keys of each row."""
        first, last = skip // self.page_size, -(-(skip + num_keys) // self.page_size)
        pages_bP = self.table.device_pages_RP[self.table.to_device(rows), first:last].long()
        offsets = torch.arange(self.page_size, device=pages_bP.device)
        slots_bL = (pages_bP.unsqueeze(-1) * self.page_size + offsets).flatten(start_dim=1)
        return slots_bL[:, :num_keys]

    def _mask(self, seen_bQ: np.ndarray, num_keys: int, window: int | None) -> Tensor | None:
        """0 for the keys a query sees and -inf for the others, [b, 1, G * Q, L]."""
        if window is None and (seen_bQ == num_keys - 1).all():
            return None
        seen = self.table.to_device(seen_bQ).unsqueeze(-1)
        padded_len = -(-num_keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
        keys = torch.arange(padded_len, device=seen.device)
        is_hidden = keys > seen
        if window is not None:
            is_hidden |= keys <= seen - window
        mask = torch.zeros(is_hidden.shape, dtype=self.dtype, device=seen.device)
        mask = mask.masked_fill_(is_hidden, float("-inf")).unsqueeze(1)
        if mask.shape[2] > 1:
            mask = mask.repeat(1, 1, self.group_size, 1)
        return mask[..., :num_keys]


def _similar(layout: StepLayout, cluster: Cluster) -> Iterator[np.ndarray]:
    """Divide a cluster so that padding to the longest wastes little in each part."""
    key_lens = layout.kv_lens_B - cluster.shared_len
    lens = np.stack([layout.query_lens_B, key_lens])[:, cluster.members]
    order = np.lexsort((lens[1], lens[0]))[::-1]
    begin = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and _fits(lens[:, order[begin]], lens[:, order[end]]):
            continue
        yield cluster.members[np.sort(order[begin:end])]
        begin = end


def _fits(longest: np.ndarray, other: np.ndarray) -> bool:
    """Whether padding `other` to the first of its part costs less than a call of its own would."""
    wasted = longest.prod() - other.prod()
    return bool(wasted <= max(longest.prod() // 3, 256))
