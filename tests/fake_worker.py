"""A worker without a device: a table and a KV memory that notice every wrong page.

Each slot remembers the whole prefix it was computed for. A step checks that the row's pages hold
exactly its prefix, so a page that was given away, evicted or shared too early fails the test. The
"model" answers with a number hashed from the prefix: what a request must get is known in advance.
"""

from __future__ import annotations

import zlib
from array import array

import numpy as np

from sgl.messages import Chunk, NewRow, StepPlan, StepResult, TokenMasks, pack, unpack

VOCAB = 50


def next_token(token_ids) -> int:
    return zlib.crc32(array("i", token_ids).tobytes()) % VOCAB


def expected_output(prompt, max_new_tokens, eos_ids=frozenset()) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in eos_ids:
            break
    return tokens[len(prompt) :]


class FakeMatcher:
    """A grammar: after a token that divides by three an even one must come, else an odd one; it
    ends with `last`."""

    num_words = 2
    error = ""

    def __init__(self, last: int = -1) -> None:
        self.last = last
        self.before = 0
        self.has_ended = False

    @property
    def parity(self) -> int:
        return int(self.before % 3 != 0)

    def take(self, ids) -> bool:
        for token_id in ids:
            if token_id % 2 != self.parity:
                return False
            self.before, self.has_ended = token_id, token_id == self.last
        return True

    def write_mask(self, words_W: np.ndarray) -> None:
        bits = np.arange(VOCAB) % 2 == self.parity
        words_W[:] = np.packbits(np.resize(bits, 64), bitorder="little").view(np.int32)


def masked_output(prompt, max_new_tokens, last=-1) -> list[int]:
    """What a request with this grammar must get."""
    tokens, matcher = list(prompt), FakeMatcher(last)
    while len(tokens) - len(prompt) < max_new_tokens and not matcher.has_ended:
        tokens.append(next_allowed(next_token(tokens), matcher.parity))
        assert matcher.take(tokens[-1:])
    return tokens[len(prompt) :]


def next_allowed(token: int, parity: int) -> int:
    return token if token % 2 == parity else (token + 1) % VOCAB


def vector_of(token_ids) -> bytes:
    """What a model that gives vectors answers."""
    return array("f", [next_token(token_ids), len(token_ids)]).tobytes()


class FakeWorker:
    def __init__(self, num_pages: int, page_size: int, gives_vectors: bool = False) -> None:
        self.page_size = page_size
        self.gives_vectors = gives_vectors
        self.slots: list[tuple[int, ...] | None] = [None] * (num_pages * page_size)
        self.pages: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}  # those with KV, and the one sampled last
        self.decode_rows: list[int] = []
        self.num_steps = 0
        self.num_tokens = 0

    def run(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        self.num_steps += 1
        self._change_rows(plan)
        self.masks = self._masks(plan, masks)
        self.num_sampled = 0
        sampled = [self._decode(row) for row in self.decode_rows]
        sampled += [token for chunk in plan.chunks if (token := self._prefill(chunk)) is not None]
        if self.gives_vectors:
            return StepResult(plan.step, b"", vectors=sampled)
        return StepResult(plan.step, pack(sampled))

    def _masks(self, plan: StepPlan, masks: TokenMasks | None) -> dict[int, np.ndarray]:
        """By the number of the sampled token: which ids it may be."""
        if not plan.masked:
            assert masks is None, "masks came for a step that needs none"
            return {}
        assert masks is not None, "the masks are not there"
        assert masks.step == plan.step
        bits = np.unpackbits(np.frombuffer(masks.words, np.uint8), bitorder="little")
        return dict(zip(unpack(plan.masked), bits.reshape(len(plan.masked) // 4, -1), strict=True))

    def _change_rows(self, plan: StepPlan) -> None:
        for row in unpack(plan.released):
            del self.pages[row], self.tokens[row]
        for new in plan.admitted:
            self._admit(new)
        for chunk in plan.chunks:
            self.pages[chunk.row] += unpack(chunk.pages)
        if plan.decode_rows is not None:
            self.decode_rows = list(unpack(plan.decode_rows))
        page_rows = unpack(plan.page_rows) if plan.page_rows else self.decode_rows
        if plan.page_ids:
            for row, page in zip(page_rows, unpack(plan.page_ids), strict=True):
                self.pages[row].append(page)

    def _decode(self, row: int) -> int:
        self._compute(row, len(self.tokens[row]) - 1)
        return self._sample(row)

    def _prefill(self, chunk: Chunk) -> int | bytes | None:
        known = self.tokens[chunk.row]
        assert chunk.start == len(known), "a chunk does not begin where the last one ended"
        known += unpack(chunk.token_ids)
        for position in range(chunk.start, len(known)):
            self._compute(chunk.row, position)
        if chunk.is_last and self.gives_vectors:
            return vector_of(known)
        return self._sample(chunk.row) if chunk.is_last else None

    def _admit(self, new: NewRow) -> None:
        assert new.row not in self.pages, f"row {new.row} was not given up"
        self.pages[new.row] = list(unpack(new.pages))
        cached = [self.slots[self._slot(new.row, p)] for p in range(new.num_cached)]
        self.tokens[new.row] = [prefix[-1] for prefix in cached if prefix is not None]
        assert len(self.tokens[new.row]) == new.num_cached, "cached pages hold no KV"

    def _compute(self, row: int, position: int) -> None:
        """Write the KV of one token, having read that of all before it."""
        self.num_tokens += 1
        tokens = self.tokens[row]
        for before in range(position):
            held = self.slots[self._slot(row, before)]
            assert held == tuple(tokens[: before + 1]), f"row {row} reads the KV of {held}"
        self.slots[self._slot(row, position)] = tuple(tokens[: position + 1])

    def _sample(self, row: int) -> int:
        token = next_token(self.tokens[row])
        mask = self.masks.get(self.num_sampled)
        self.num_sampled += 1
        if mask is not None and not mask[token]:
            token = (token + 1) % VOCAB
            assert mask[token]
        self.tokens[row].append(token)
        return token

    def _slot(self, row: int, position: int) -> int:
        page = self.pages[row][position // self.page_size]
        return page * self.page_size + position % self.page_size
