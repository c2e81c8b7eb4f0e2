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
    ends with `last`.

    opening  what it begins with
    runs     every so many numbers there is one that three others must follow
    """

    num_words = 2
    error = ""

    def __init__(self, last=-1, *, opening=(), runs=0) -> None:
        self.last = last
        self.opening = list(opening)
        self.runs = runs
        self.taken: list[int] = []

    @property
    def has_ended(self) -> bool:
        return self.taken[-1:] == [self.last]

    def forced(self) -> list[int]:
        left = self.opening
        for token_id in self.taken:
            left = left[1:] or self._run(token_id)
        return left

    def take(self, ids) -> bool:
        for token_id in ids:
            if token_id not in self.allowed():
                return False
            self.taken.append(token_id)
        return True

    def take_back(self, num_tokens: int) -> None:
        del self.taken[len(self.taken) - num_tokens :]

    def allowed(self) -> list[int]:
        if forced := self.forced():
            return forced[:1]
        before = self.taken[-1] if self.taken else 0
        return [token_id for token_id in range(VOCAB) if token_id % 2 == (before % 3 != 0)]

    def write_mask(self, words_W: np.ndarray) -> None:
        bits = np.isin(np.arange(32 * self.num_words), self.allowed())
        words_W[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def _run(self, begin: int) -> list[int]:
        if not self.runs or begin % self.runs != 1:
            return []
        return [(begin + step) % VOCAB for step in (20, 23, 26)]


def masked_output(prompt, max_new_tokens, last=-1, **options) -> list[int]:
    """What a request with this grammar must get."""
    matcher = FakeMatcher(last, **options)
    while len(matcher.taken) < max_new_tokens and not matcher.has_ended:
        token = next_allowed(next_token([*prompt, *matcher.taken]), matcher.allowed())
        assert matcher.take([token])
    return matcher.taken


def next_allowed(token: int, allowed: list[int]) -> int:
    return next(one % VOCAB for one in range(token, token + VOCAB) if one % VOCAB in allowed)


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
        which = unpack(masks.which)
        bits = np.unpackbits(np.frombuffer(masks.words, np.uint8), bitorder="little")
        bits = bits.reshape(max(which) + 1, -1)
        return {at: bits[mask] for at, mask in zip(unpack(plan.masked), which, strict=True)}

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
        if mask is not None:
            token = next_allowed(token, mask.nonzero()[0].tolist())
        self.tokens[row].append(token)
        return token

    def _slot(self, row: int, position: int) -> int:
        page = self.pages[row][position // self.page_size]
        return page * self.page_size + position % self.page_size
