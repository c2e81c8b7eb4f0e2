"""Token ids to text while they arrive: whole characters only, and never part of a stop string.

    ids ── byte table ──▶ bytes ── UTF-8 ──▶ characters ── stop strings ──▶ text that may be shown
                                     │                        │
                          holds back at most 3      holds back the longest end of the text
                          bytes of a character      that begins a stop string

Everything shown, joined, is what decoding all the ids at once gives, up to the stop string. Stop
strings are looked for after each token: the earliest in the text wins, of several there the
longest. The work per token is constant: nothing is ever decoded twice.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a tokenizer that a stream needs."""

    def byte_table(self, skip_special_tokens: bool) -> Mapping[int, bytes]: ...


class TextStream:
    """The text of one request.

    num_tokens   tokens that belong to the answer; those pushed after a stop string do not
    matched      the stop string that ended the text; nothing follows it
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        no_stop_trim: bool = False,
        kept_ids: Sequence[int] = (),
    ) -> None:
        """`kept_ids` leave text though they may be special tokens."""
        self.num_tokens = 0
        self.matched: str | None = None
        self._bytes_of = _bytes_of(tokenizer, skip_special_tokens, kept_ids)
        self._no_stop_trim = no_stop_trim
        self._started = b""  # bytes of a character whose end has not come yet
        self._stops = stop_strings(stop) if stop else None
        self._state = ROOT
        self._held = ""  # characters that may turn out to begin a stop string

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that can be shown now that these tokens are known."""
        if self._stops is None:
            self.num_tokens += len(token_ids)
            return self._characters(b"".join([self._bytes_of(it, b"") for it in token_ids]))
        shown = ""
        for token_id in token_ids:
            if self.matched is not None:
                break
            self.num_tokens += 1
            characters = self._characters(self._bytes_of(token_id, b""))
            shown += self._before_stop(characters, self._stops)
        return shown

    def finish(self, stop_id: int | None = None) -> str:
        """The rest of the text. `stop_id` is the token that ended it, if one did."""
        if self.matched is not None:
            return ""
        if stop_id is None:
            return self._flush()
        if self._no_stop_trim:
            shown = self.push([stop_id])
            return shown + self._flush()
        self.num_tokens += 1
        return self._flush()

    def _flush(self) -> str:
        characters = self._characters(b"", is_last=True)
        if self._stops is None or self.matched is not None:
            return characters
        shown = self._before_stop(characters, self._stops)
        return shown if self.matched is not None else shown + self._held

    def _characters(self, data: bytes, is_last: bool = False) -> str:
        """The characters these bytes complete; U+FFFD for what can never become one."""
        text, num_used = utf_8_decode(self._started + data, "replace", is_last)
        self._started = (self._started + data)[num_used:]
        return text

    def _before_stop(self, characters: str, stops: StopStrings) -> str:
        """What of the held and the new characters can be shown."""
        text = self._held + characters
        found: tuple[int, str] | None = None
        for end, char in enumerate(characters, start=len(self._held) + 1):
            self._state = stops.step(self._state, char)
            stop = stops.ended[self._state]
            if stop is not None and (found is None or end - len(stop) <= found[0]):
                found = (end - len(stop), stop)
        if found is not None:
            start, self.matched = found
            return text[:start] + (self.matched if self._no_stop_trim else "")
        num_shown = len(text) - stops.depth[self._state]
        self._held = text[num_shown:]
        return text[:num_shown]


def _bytes_of(
    tokenizer: TokenBytes, skip_special_tokens: bool, kept_ids: Sequence[int]
) -> Callable[[int, bytes], bytes]:
    """What a token adds to the text, or the second argument."""
    table = tokenizer.byte_table(skip_special_tokens)
    if not (skip_special_tokens and kept_ids):
        return table.get
    whole = tokenizer.byte_table(False)
    kept = {token_id: whole[token_id] for token_id in kept_ids if token_id in whole}
    return lambda token_id, missing: kept.get(token_id) or table.get(token_id, missing)


ROOT = 0


class StopStrings:
    """Finds several strings at once (Aho and Corasick); immutable, so that requests share it.

    A state stands for the longest end of the text that begins some stop string.
    depth[state]   how many characters that is
    ended[state]   the longest stop string that ends here, if one does
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.depth = [0]
        self.ended: list[str | None] = [None]
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [ROOT]  # the state of the next shorter end of the text
        for stop in stops:
            self._add(stop)
        self._link()

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state and char not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(char, ROOT)

    def _add(self, stop: str) -> None:
        state = ROOT
        for depth, char in enumerate(stop, start=1):
            if char not in self._next[state]:
                self._next[state][char] = len(self.depth)
                self.depth.append(depth)
                self.ended.append(None)
                self._next.append({})
                self._shorter.append(ROOT)
            state = self._next[state][char]
        self.ended[state] = stop

    def _link(self) -> None:
        """Shorter states come first, so that a link can be found by following the parent's."""
        level = [ROOT]
        while level:
            edges = [(parent, *edge) for parent in level for edge in self._next[parent].items()]
            for parent, char, state in edges:
                if parent != ROOT:
                    self._shorter[state] = self.step(self._shorter[parent], char)
                self.ended[state] = self.ended[state] or self.ended[self._shorter[state]]
            level = [state for _, _, state in edges]


@lru_cache(maxsize=32)
def stop_strings(stops: tuple[str, ...]) -> StopStrings:
    """The machine for these stop strings; most requests of a server have the same ones."""
    return StopStrings(stops)
