"""Which token runs have their KV in the cache, and in which pages: a radix tree with LRU eviction.

    root ── "You are a" ──┬── " helpful bot. Hi" ──┬── " there"       the run of an edge is kept
            pages 0-3     │   pages 4-9            │   pages 12-13    in the node it leads to;
                          │                        └── ", who"        whole pages only, a part
                          └── " cat. Meow"             pages 20-21    of one never enters
                              pages 14-17

Who owns a page: the tree, from the `insert` that brought it until `evict` hands it out.
What the tree owns is either pinned (a request runs on it) or evictable, so that always

    slots.num_free + num_evictable + num_pinned + pages private to requests = slots.num_pages

Recency needs no clock. The unpinned nodes form a list, least recently used first; using a path
moves its nodes to the end, the deepest first. A node thus always comes before its ancestors, and
the head of the list is always a leaf: the next one to evict.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sgl.messages import Int32Bytes
from sgl.scheduling.radix_node import INT32_LEN, Node, RecencyList, Root

__all__ = ["Inserted", "Match", "Node", "RadixCache"]


class Match(NamedTuple):
    """The longest cached prefix: its pages stay the tree's; pin `node` to keep them there."""

    node: Node
    pages: array[int]
    num_tokens: int


class Inserted(NamedTuple):
    """An inserted run: its end, and the tree's pages for all of it.

    The tree had the first `num_cached` tokens already. Where its page for them is another than the
    caller's, the caller's still belongs to the caller: to give back, once it uses the tree's.
    """

    node: Node
    pages: array[int]
    num_cached: int


class RadixCache:
    """The tree. Runs in different namespaces never share anything.

    A node that `match`, `find` or `insert` returned is good until the next `evict`, or while it is
    pinned.
    """

    def __init__(self, page_size: int) -> None:
        assert page_size > 0, f"a page cannot hold {page_size} tokens"
        self.page_size = page_size
        self.num_nodes = 0
        self.num_evictable = 0
        self.num_pinned = 0
        self._key_len = page_size * INT32_LEN
        self._roots: dict[str, Node] = {}
        self._unpinned = RecencyList()

    def match(self, token_ids: array[int], namespace: str = "", limit: int | None = None) -> Match:
        """The longest cached prefix of `token_ids[:limit]`, which counts as used now."""
        path, found_len = self._walk_and_split(self._whole_pages(token_ids, limit), namespace)
        self._use(path)
        return Match(path[-1], _pages_of(path), found_len // INT32_LEN)

    def match_len(
        self, token_ids: array[int], namespace: str = "", limit: int | None = None
    ) -> int:
        """How many tokens `match` would find. Changes nothing, not even recency."""
        return self._walk(self._whole_pages(token_ids, limit), namespace).found_len // INT32_LEN

    def find(self, token_ids: array[int], namespace: str = "", limit: int | None = None) -> Node:
        """The deepest node whose whole run is in `token_ids[:limit]`. Changes nothing either."""
        path, _, last_len = self._walk(self._whole_pages(token_ids, limit), namespace)
        return path[-1] if last_len == len(path[-1].tokens) else path[-2]

    def insert(self, token_ids: array[int], pages: array[int], namespace: str = "") -> Inserted:
        """Add a run, which counts as used now. The tree takes the `pages` of its uncached part."""
        tokens, own_pages = self._whole_pages(token_ids, None), pages.tobytes()
        assert len(tokens) == len(own_pages) * self.page_size, (
            f"{len(pages)} pages of {self.page_size} do not hold {len(token_ids)} tokens"
        )
        path, found_len = self._walk_and_split(tokens, namespace)
        if found_len < len(tokens):
            leaf = Node(tokens[found_len:].tobytes(), own_pages[found_len // self.page_size :])
            self._grow(path, leaf, namespace)
        self._use(path)
        return Inserted(path[-1], _pages_of(path), found_len // INT32_LEN)

    def pin(self, node: Node) -> None:
        """Keep everything from the root to `node` until the matching `unpin`."""
        assert node.parent is not None or not node.tokens, (
            f"{node} was evicted before it was pinned"
        )
        while node.parent is not None:
            if node.num_pins == 0:
                self._unpinned.remove(node)
                self.num_evictable -= node.num_pages
                self.num_pinned += node.num_pages
            node.num_pins += 1
            node = node.parent

    def unpin(self, node: Node) -> None:
        """Take one `pin` of `node` back. What nobody pins any more counts as used now."""
        while node.parent is not None:
            assert node.num_pins > 0, f"{node} was unpinned more often than pinned"
            node.num_pins -= 1
            if node.num_pins == 0:
                self._unpinned.append(node)
                self.num_evictable += node.num_pages
                self.num_pinned -= node.num_pages
            node = node.parent

    def evict(self, num_pages: int) -> array[int]:
        """Forget the least recently used `num_pages`, or all unpinned ones if there are fewer.

        The pages belong to the caller. Of a long run only as much as needed goes, from its end.
        """
        evicted = array("i")
        num_missing = max(0, min(num_pages, self.num_evictable))
        self.num_evictable -= num_missing
        while num_missing > 0:
            leaf = self._unpinned.oldest
            assert leaf is not None, f"{num_missing} evictable pages are in no unpinned node"
            num_kept = max(0, leaf.num_pages - num_missing)
            num_missing -= leaf.num_pages - num_kept
            evicted.frombytes(leaf.pages[num_kept * INT32_LEN :])
            if num_kept:
                leaf.pages = leaf.pages[: num_kept * INT32_LEN]
                leaf.tokens = leaf.tokens[: num_kept * self._key_len]
            else:
                self._remove(leaf)
        return evicted

    def reset(self) -> array[int]:
        """Forget everything that is not pinned; the pages belong to the caller."""
        return self.evict(self.num_evictable)

    def check(self) -> None:
        """Raise AssertionError if the tree, its list or its numbers disagree. O(cached tokens)."""
        nodes = list(self._each_node())
        for node in nodes:
            self._check_node(node)
        for namespace, root in self._roots.items():
            assert root.children, f"the empty namespace {namespace!r} was not dropped"
        self._check_recency(nodes)
        pages = [page for node in nodes for page in array("i", node.pages)]
        num_pinned = sum(node.num_pages for node in nodes if node.num_pins)
        assert len(pages) == len(set(pages)), "one page is in the tree twice"
        assert num_pinned == self.num_pinned, f"{num_pinned} pinned, not {self.num_pinned}"
        assert len(pages) == num_pinned + self.num_evictable, f"{len(pages)} pages in the tree"
        assert len(nodes) == self.num_nodes, f"{len(nodes)} nodes, not {self.num_nodes}"

    def _whole_pages(self, token_ids: array[int], limit: int | None) -> memoryview:
        """The bytes of the whole pages of `token_ids[:limit]`.

        A view: a prompt may be long and nothing of it cached.
        """
        num_tokens = len(token_ids) if limit is None else min(limit, len(token_ids))
        num_pages = max(0, num_tokens) // self.page_size
        return _bytes_of(token_ids)[: num_pages * self._key_len]

    def _walk(self, tokens: memoryview, namespace: str) -> _Walk:
        """Follow `tokens` down from the root as far as whole pages agree."""
        node: Node = self._roots.get(namespace) or Root(namespace=namespace)
        path, found_len = [node], 0
        while found_len < len(tokens):
            child = node.child(tokens[found_len : found_len + self._key_len].tobytes())
            if child is None:
                break
            node = child
            path.append(node)
            part = tokens[found_len : found_len + len(node.tokens)].tobytes()
            if part != node.tokens:
                shared_len = self._shared_len(part, node.tokens)
                return _Walk(path, found_len + shared_len, shared_len)
            found_len += len(node.tokens)
        return _Walk(path, found_len, len(node.tokens))

    def _walk_and_split(self, tokens: memoryview, namespace: str) -> tuple[list[Node], int]:
        """As `_walk`, but the path ends exactly where the agreement ends."""
        path, found_len, last_len = self._walk(tokens, namespace)
        if last_len < len(path[-1].tokens):
            path[-1] = self._split(path[-1], last_len)
        return path, found_len

    def _shared_len(self, part: Int32Bytes, run: Int32Bytes) -> int:
        """How many leading bytes are the same, in whole pages; `part` is not longer than `run`."""
        if run.startswith(part):
            return len(part)
        ours = np.frombuffer(run, np.int32, len(part) // INT32_LEN)
        theirs = np.frombuffer(part, np.int32)
        return int((ours != theirs).argmax()) // self.page_size * self._key_len

    def _split(self, node: Node, upper_len: int) -> Node:
        """Cut a run in two; returns the new upper node, which the caller is about to use.

        `node` stays the lower one: whoever pinned it pinned the path to its end.
        """
        parent = node.parent
        assert parent is not None, "a root has no run to split"
        pages_len = upper_len // self.page_size
        upper = Node(node.tokens[:upper_len], node.pages[:pages_len], num_pins=node.num_pins)
        parent.detach(node, self._key_len)
        node.tokens, node.pages = node.tokens[upper_len:], node.pages[pages_len:]
        parent.attach(upper, self._key_len)
        upper.attach(node, self._key_len)
        self.num_nodes += 1
        if node.num_pins == 0:
            self._unpinned.append(upper)
        return upper

    def _grow(self, path: list[Node], leaf: Node, namespace: str) -> None:
        root, parent = path[0], path[-1]
        self._roots[namespace] = root
        parent.attach(leaf, self._key_len)
        path.append(leaf)
        self._unpinned.append(leaf)
        self.num_nodes += 1
        self.num_evictable += leaf.num_pages

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None, "a root is never evicted"
        parent.detach(leaf, self._key_len)
        self._unpinned.remove(leaf)
        self.num_nodes -= 1
        if isinstance(parent, Root) and not parent.children:
            del self._roots[parent.namespace]

    def _use(self, path: Sequence[Node]) -> None:
        """Make a path the most recently used one, its end less so than what leads there."""
        for node in path[:0:-1]:
            if node.num_pins:
                return  # and so is all above it
            self._unpinned.remove(node)
            self._unpinned.append(node)

    def _each_node(self) -> Iterator[Node]:
        """Every node but the roots, parents before their children."""
        unseen: list[Node] = list(self._roots.values())
        while unseen:
            children = unseen.pop().each_child()
            yield from children
            unseen.extend(children)

    def _check_node(self, node: Node) -> None:
        assert len(node.tokens) == len(node.pages) * self.page_size > 0, f"{node} is ragged"
        assert node.parent is not None, f"{node} has no parent"
        assert node.parent.child(node.tokens[: self._key_len]) is node, f"{node} is not found"
        num_pins_below = sum(child.num_pins for child in node.each_child())
        assert node.num_pins >= num_pins_below, f"{node} has {num_pins_below} pins below"

    def _check_recency(self, nodes: list[Node]) -> None:
        rank = {node: place for place, node in enumerate(self._unpinned)}
        assert rank.keys() == {node for node in nodes if not node.num_pins}, "the list is wrong"
        for node in rank:
            above = rank.get(node.parent, len(rank)) if node.parent else len(rank)
            assert rank[node] < above, f"{node} would be evicted after its parent"


class _Walk(NamedTuple):
    """How far some tokens lead.

    path        the nodes that hold them, from the root on
    found_len   bytes of them that are cached
    last_len    bytes of these that are in the last node
    """

    path: list[Node]
    found_len: int
    last_len: int


def _pages_of(path: list[Node]) -> array[int]:
    return array("i", b"".join([node.pages for node in path]))


def _bytes_of(token_ids: array[int]) -> memoryview:
    return memoryview(token_ids).cast("B") if token_ids else memoryview(b"")  # cannot cast nothing
