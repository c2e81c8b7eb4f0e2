"""One session: a tree of requests, each of which goes on where another had ended.

    "Tell me about France." ── "It is …"
                                 ├── "And its capital?" ── "Paris …"
                                 └── "And its rivers?" ── "The Seine …"

A node holds the tokens that it adds to its parent's, so a long conversation is kept once.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from sgl.protocol.call import Answer

NODE_TOKENS = 256  # a node takes as much memory as so many tokens


@dataclass(slots=True, eq=False)
class Node:
    """A request and its answer.

    request_id   in the engine, while it runs
    num_shared   leading tokens that are its parent's
    own          tokens after those: of its prompt, and once it has ended of its answer
    running      its answer, while that grows
    """

    session: Session
    rid: str
    request_id: int
    parent: Node | None
    num_shared: int
    own: array[int]
    num_chars: int
    running: Answer | None
    children: list[Node] = field(default_factory=list)

    def ids(self) -> array[int]:
        """All tokens from the root on, with what is there of an answer that grows."""
        parts = [self.own if self.running is None else self.own + self.running.output_ids]
        num_wanted, node = self.num_shared, self.parent
        while node is not None:
            parts.append(node.own[: max(0, num_wanted - node.num_shared)])
            num_wanted, node = min(num_wanted, node.num_shared), node.parent
        whole = array("i")
        for part in reversed(parts):
            whole += part
        return whole


class Session:
    """The tree, and how much is in it.

    capacity     characters that it may hold
    num_tokens   what it takes of the server's memory, in tokens
    """

    def __init__(self, capacity: int, now: float) -> None:
        self.capacity = capacity
        self.last_used = now
        self.num_running = 0
        self.num_chars = 0
        self.num_tokens = 0
        self._nodes: dict[str, Node] = {}

    def get(self, rid: str) -> Node | None:
        return self._nodes.get(rid)

    def after(self, node: Node | None) -> list[Node]:
        """What followed on a node; on None, the whole tree."""
        if node is None:
            return list(self._nodes.values())
        found = list(node.children)
        for one in found:  # grows while it is walked
            found += one.children
        return found

    def add(self, node: Node) -> None:
        """A request that runs from now on."""
        self._nodes[node.rid] = node
        self.num_running += 1
        self.num_chars += node.num_chars
        self.num_tokens += len(node.own) + NODE_TOKENS
        if node.parent is not None:
            node.parent.children.append(node)

    def end(self, node: Node, num_chars: int, now: float) -> None:
        """The answer of a node is there, with so many characters; one that failed is forgotten."""
        assert node.running is not None, "a request ends once"
        answer, node.running = node.running, None
        self.num_running -= 1
        self.last_used = now
        if answer.failure is not None:
            self.remove([node])
        elif self._nodes.get(node.rid) is node:
            node.own += answer.output_ids
            node.num_chars += num_chars
            self.num_tokens += len(answer.output_ids)
            self.num_chars += num_chars

    def remove(self, nodes: Sequence[Node]) -> None:
        """Forget them; whatever followed on one of them must be among them."""
        for node in nodes:
            del self._nodes[node.rid]
            self.num_chars -= node.num_chars
            self.num_tokens -= len(node.own) + NODE_TOKENS
            if node.parent is not None:
                node.parent.children.remove(node)
