"""What a radix tree is made of: nodes, and the list that says which of them was used last."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from sgl.messages import Int32Bytes

INT32_LEN = array("i").itemsize
FEW_CHILDREN = 8  # so many are searched one by one: a dict for each node would double the tree


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """A run of whole pages. It is the end of every path that ends with its last token.

    num_pins       pins that end here or below
    older, newer   neighbours in the list of unpinned nodes
    """

    tokens: Int32Bytes = b""
    pages: Int32Bytes = b""
    parent: Node | None = None
    children: tuple[Node, ...] | dict[Int32Bytes, Node] = ()
    num_pins: int = 0
    older: Node | None = None
    newer: Node | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.num_pages} pages, {self.num_pins} pins>"

    @property
    def num_pages(self) -> int:
        return len(self.pages) // INT32_LEN

    def child(self, first_page: Int32Bytes) -> Node | None:
        """The child whose run starts with these tokens; there is at most one."""
        if isinstance(self.children, dict):
            return self.children.get(first_page)
        for child in self.children:
            if child.tokens.startswith(first_page):
                return child
        return None

    def each_child(self) -> Collection[Node]:
        return self.children.values() if isinstance(self.children, dict) else self.children

    def attach(self, child: Node, key_len: int) -> None:
        """Become the parent of `child`, found from now on by its first `key_len` bytes."""
        child.parent = self
        if isinstance(self.children, dict):
            self.children[child.tokens[:key_len]] = child
        elif len(self.children) < FEW_CHILDREN:
            self.children += (child,)
        else:
            self.children = {each.tokens[:key_len]: each for each in (*self.children, child)}

    def detach(self, child: Node, key_len: int) -> None:
        child.parent = None
        if not isinstance(self.children, dict):
            self.children = tuple(each for each in self.children if each is not child)
            return
        del self.children[child.tokens[:key_len]]
        if len(self.children) <= FEW_CHILDREN // 2:
            self.children = tuple(self.children.values())


@dataclass(slots=True, eq=False, repr=False)
class Root(Node):
    """Where the paths of one namespace start. It holds no pages, so pins pass it by."""

    namespace: str = ""


class RecencyList:
    """Unpinned nodes, least recently used first, linked through the nodes themselves."""

    def __init__(self) -> None:
        self.oldest: Node | None = None
        self.newest: Node | None = None

    def __iter__(self) -> Iterator[Node]:
        node = self.oldest
        while node is not None:
            yield node
            node = node.newer

    def append(self, node: Node) -> None:
        self._join(self.newest, node)
        self._join(node, None)

    def remove(self, node: Node) -> None:
        self._join(node.older, node.newer)
        node.older = node.newer = None

    def _join(self, older: Node | None, newer: Node | None) -> None:
        """Make two nodes neighbours; None stands for the end of the list."""
        if older is None:
            self.oldest = newer
        else:
            older.newer = newer
        if newer is None:
            self.newest = older
        else:
            newer.older = older
