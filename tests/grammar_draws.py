"""Answers drawn at random among the tokens that a grammar allows."""

from __future__ import annotations

import random

import numpy as np

from sgl.constrained.matcher import CompiledGrammar, Matcher
from sgl.tokenizer import Tokenizer


def allowed_ids(matcher: Matcher) -> np.ndarray:
    words_W = np.zeros(matcher.num_words, np.uint32)
    matcher.write_mask(words_W)
    return np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little"))


def draw_answer(
    compiled: CompiledGrammar, tokenizer: Tokenizer, seed: int, most: int = 400
) -> str | None:
    """Now and then what is forced is taken at once, as jump-forward does. It ends when an end is
    drawn, or where it can after `most` tokens; None if it cannot within twice as many."""
    rng = random.Random(seed)
    matcher = compiled.matcher()
    ends = sorted(tokenizer.eos_ids)
    ids: list[int] = []
    while not matcher.has_ended:
        forced = matcher.forced() if rng.random() < 0.5 else []
        choices = allowed_ids(matcher)
        assert choices.size, matcher.error
        if forced:
            assert choices.tolist() == forced[:1]
        may_end = np.isin(ends, choices).any()
        if may_end and (len(ids) >= most or rng.random() < 0.2):
            break
        choices = choices[~np.isin(choices, ends)]
        if not choices.size:
            break
        taken = forced or [int(choices[rng.randrange(len(choices))])]
        assert matcher.take(taken), matcher.error
        ids += taken
        if len(ids) > 2 * most:
            return None
    assert matcher.may_end
    return tokenizer.decode(ids)
