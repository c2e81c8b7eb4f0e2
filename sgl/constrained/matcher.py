"""Where an answer is in its grammar: the tokens that may come next, token by token.

llguidance does the work: a lexer of regular-expression derivatives and an Earley parser over the
bytes of tokens (https://github.com/guidance-ai/llguidance). Limits on both keep one grammar from
taking the time and the memory of all.

Axes: W words of a mask, a bit for each id of the vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from sgl.errors import ConfigError, InvalidRequestError
from sgl.sampling_params import Grammar

JSON_SPACE = "[ ]?"  # a model cannot go on with spaces for ever
MAX_ERROR_CHARS = 300
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # 20 ms
    step_lexer_fuel=100_000,  # of a mask: 7 ms
    max_lexer_states=50_000,  # 1 to 2 kB each
    max_grammar_size=30_000,  # symbols: time to compile grows with their square
    precompute_large_lexemes=False,
    verbose_errors=False,
)


class GrammarVocabulary:
    """What grammars must know of a tokenizer: the bytes of each id, and the ids that end an answer.

    Thread-safe; made once (half a second).
    """

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        end_ids: Iterable[int],
        json_space: str = JSON_SPACE,
    ) -> None:
        """`vocab_size` is that of the logits: ids beyond the tokenizer's are never allowed.

        json_space  regular expression of what may stand wherever JSON allows space
        """
        self.tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(end_ids))
        self.num_words = -(-vocab_size // 32)
        self.json_space = json_space


class CompiledGrammar:
    """A grammar that compiles. Making one may take a second, a matcher of it microseconds."""

    def __init__(self, grammar: Grammar, vocabulary: GrammarVocabulary) -> None:
        """Raises InvalidRequestError where it is wrong, not supported or too large."""
        text = grammar.text
        if grammar.is_schema:
            text = _json_grammar(text, vocabulary.json_space)
        problem = LLMatcher.validate_grammar(text, vocabulary.tokenizer, limits=LIMITS)
        if not problem:
            self._fresh = LLMatcher(vocabulary.tokenizer, text, limits=LIMITS, log_level=0)
            problem = self._fresh.get_error() if self._fresh.is_error() else ""
        if problem:
            shown = " ".join(problem.split())[:MAX_ERROR_CHARS]
            raise InvalidRequestError(f"{grammar.kind}: {shown}", param=grammar.kind)
        self.vocabulary = vocabulary
        self._fresh.compute_ff_tokens()  # builds the part of the lexer that every matcher begins in

    def matcher(self) -> Matcher:
        return Matcher(self._fresh.deep_copy(), self.vocabulary)


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: GrammarVocabulary) -> None:
        self._matcher = matcher
        self.num_words = vocabulary.num_words

    def take(self, ids: Sequence[int]) -> bool:
        """Go on by tokens; False, and nothing changes, where one is not allowed."""
        if self._matcher.validate_tokens(list(ids)) < len(ids):
            return False
        return self._matcher.consume_tokens(list(ids))

    def write_mask(self, words_W: np.ndarray) -> None:
        """A bit for each id that may come next, the lowest first: 32-bit words, contiguous."""
        assert words_W.shape == (self.num_words,), f"a mask of {words_W.shape}"
        assert words_W.itemsize == 4, f"a mask of {words_W.dtype}"
        assert words_W.flags.c_contiguous, "the words must lie end to end"
        self._matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer writes their text; often none.

        A tail that could be the beginning of a longer token is left out.
        """
        return list(self._matcher.compute_ff_tokens())

    def take_back(self, num_tokens: int) -> None:
        """Forget the last tokens that were taken."""
        self._matcher.rollback(num_tokens)

    @property
    def may_end(self) -> bool:
        """Whether what was taken matches the whole grammar."""
        return self._matcher.is_accepting()

    @property
    def has_ended(self) -> bool:
        """Whether nothing but an end can follow, or it came."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why it cannot go on, if a limit was met on the way; else nothing."""
        return self._matcher.get_error() if self._matcher.is_error() else ""


def check_json_space(pattern: str) -> None:
    """Raises ConfigError for a pattern that no answer can be written with."""
    if problem := LLMatcher.validate_grammar(_json_grammar("{}", pattern), limits=LIMITS):
        shown = " ".join(problem.split())[:MAX_ERROR_CHARS]
        raise ConfigError(
            f"--constrained-json-whitespace-pattern {pattern!r} cannot be used: {shown}. "
            f"Give a regular expression such as {JSON_SPACE!r}"
        )


def _json_grammar(schema: str, space: str) -> str:
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": space})
