"""Where an answer is in its grammar: the tokens that may come next, token by token.

llguidance does the work: a lexer of regular-expression derivatives and an Earley parser over the
bytes of tokens (https://github.com/guidance-ai/llguidance). Limits on both keep one grammar from
taking the time and the memory of all; they hold from the first mask on, not before.

Axes: W words of a mask, a bit for each id of the vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from time import thread_time

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from sgl.constrained.grammar import refused
from sgl.constrained.translation import translate
from sgl.errors import ConfigError, InvalidRequestError
from sgl.sampling_params import Grammar, GrammarKind

JSON_SPACE = "[ ]?"  # a model cannot go on with spaces for ever
MAX_ERROR_CHARS = 300
MAX_OPENING_BYTES = 20_000  # that are given from the start: they become tokens while others wait
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # 20 ms
    step_lexer_fuel=100_000,  # of a mask: 7 ms; 25,000 do not do for what users write
    step_max_items=25_000,  # of a mask: 2 ms, where no item comes about in many ways
    max_lexer_states=50_000,  # 1 to 2 kB each; of all answers under one grammar together
    max_grammar_size=30_000,  # symbols: time to compile grows with their square
    precompute_large_lexemes=False,
    verbose_errors=False,
)
# Tokens of one of these are added to a mask at once where the grammar allows the whole class next;
# without, `[a-z ]{1,500}` costs 0.3 ms a token, with them 0.02 (SmolLM2). llguidance adds what JSON
# strings may hold. Each is a class and a count: that is what it can compare.
WORD_SLICES = [
    f"[{letters}]{{1,30}}"
    for letters in ("a-z", "a-z ", "a-zA-Z", "a-zA-Z ", "a-zA-Z0-9_", "a-zA-Z0-9_ ")
]
# What the limits do not see, the clock does: 0.1 ms a token is usual, and all streams wait for it.
ALLOWANCE_S = 0.2
ALLOWED_S_A_TOKEN = 0.005


class VocabularyFacts(msgspec.Struct, frozen=True, array_like=True):
    """What a `GrammarVocabulary` is made of, in this process or another.

    vocab_size  that of the logits: ids beyond the tokenizer's are never allowed
    json_space  regular expression of what may stand wherever JSON allows space
    """

    tokenizer_json: str
    vocab_size: int
    end_ids: tuple[int, ...]
    json_space: str = JSON_SPACE


class GrammarVocabulary:
    """What grammars must know of a tokenizer: the bytes of each id, and the ids that end an answer.

    Thread-safe; made once (half a second).
    """

    def __init__(self, facts: VocabularyFacts) -> None:
        self.tokenizer = LLTokenizer(
            facts.tokenizer_json,
            n_vocab=facts.vocab_size,
            eos_token=sorted(facts.end_ids),
            slices=WORD_SLICES + LLTokenizer.general_slices(),
        )
        self.num_words = -(-facts.vocab_size // 32)
        self.json_space = facts.json_space


class CompiledGrammar:
    """A grammar that compiles. Making one may take seconds, a matcher of it microseconds.

    Its matchers share the states of one lexer: once these are too many, none of them can go on, and
    it `is_used_up`.
    """

    def __init__(self, kind: GrammarKind, text: str, vocabulary: GrammarVocabulary) -> None:
        """`text` is in llguidance's language.

        Raises InvalidRequestError where it is wrong, not supported or too large. Other threads run
        meanwhile.
        """
        self.vocabulary = vocabulary
        self.is_used_up = False
        self._fresh = LLMatcher(vocabulary.tokenizer, text, limits=LIMITS, log_level=0)
        words_W = np.empty(vocabulary.num_words, np.int32)
        if not self._fresh.is_error():  # the part of the lexer that every matcher begins in
            self._fresh.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
        if self._fresh.is_error():
            raise refused(kind, _in_words(self._fresh.get_error()))
        if (num := len(self._fresh.compute_ff_bytes())) > MAX_OPENING_BYTES:
            raise refused(
                kind,
                f"it leaves no choice in the first {num} bytes of the answer, at most "
                f"{MAX_OPENING_BYTES} can be given: put them into the prompt",
            )

    @classmethod
    def of(cls, grammar: Grammar, vocabulary: GrammarVocabulary) -> CompiledGrammar:
        """From what a client wrote; raises InvalidRequestError."""
        return cls(grammar.kind, translate(grammar, vocabulary.json_space), vocabulary)

    def matcher(self) -> Matcher:
        return Matcher(self._fresh.deep_copy(), self)


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher, grammar: CompiledGrammar) -> None:
        self._matcher = matcher
        self._grammar = grammar
        self.num_words = grammar.vocabulary.num_words
        self._left_s = ALLOWANCE_S

    def take(self, ids: Sequence[int]) -> bool:
        """Go on by tokens; False, and nothing changes, where one is not allowed."""
        begun = thread_time()
        wanted = list(ids)
        if len(wanted) == 1:
            is_taken = self._matcher.try_consume_tokens(wanted) == 1
        else:
            is_allowed = self._matcher.validate_tokens(wanted) == len(wanted)
            is_taken = is_allowed and self._matcher.consume_tokens(wanted)
        self._left_s += ALLOWED_S_A_TOKEN * len(wanted)
        self._count(begun)
        return is_taken

    def write_mask(self, words_W: np.ndarray) -> None:
        """A bit for each id that may come next, the lowest first: 32-bit words, contiguous.

        Where `error` says that it cannot go on, only an end is allowed.
        """
        assert words_W.shape == (self.num_words,), f"a mask of {words_W.shape}"
        assert words_W.itemsize == 4, f"a mask of {words_W.dtype}"
        assert words_W.flags.c_contiguous, "the words must lie end to end"
        begun = thread_time()
        self._matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
        self._count(begun)

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer writes their text; often none.

        A tail that could be the beginning of a longer token is left out.
        """
        begun = thread_time()
        forced = self._matcher.compute_ff_tokens()
        self._count(begun)
        return forced

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
        if self._matcher.is_error():
            return _in_words(self._matcher.get_error())
        return _TOO_SLOW if self._left_s < 0 else ""

    def _count(self, begun: float) -> None:
        """Of this thread's own time: that others need the core is not the grammar's fault."""
        self._left_s -= thread_time() - begun
        if self._matcher.is_error() and _IN_LEXER in self._matcher.get_error():
            self._grammar.is_used_up = True


_TOO_SLOW = (
    f"what may come next takes over {ALLOWED_S_A_TOKEN * 1000:.0f} ms a token to find out: "
    "make it simpler, with fewer ways to read one text"
)
_IN_LEXER = "lexer error"
_ADVICE = {
    _IN_LEXER: "its regular expressions need too many states: use smaller counters, and fewer "
    "parts that may begin anywhere",
    "items": "too many of its rules could go on at one point: make it less ambiguous",
    "NoExtension": "no text can match what is left of it",
}


def _in_words(error: str) -> str:
    """llguidance's words, and what can be done."""
    shown = " ".join(error.replace("<non-verbose/>", "").split())[:MAX_ERROR_CHARS]
    advice = next((advice for sign, advice in _ADVICE.items() if sign in error), "")
    return f"{advice} ({shown})" if advice else shown


def check_json_space(pattern: str) -> None:
    """Raises ConfigError for a pattern that no answer can be written with."""
    grammar = Grammar(GrammarKind.JSON_SCHEMA, "{}")
    try:
        problem = LLMatcher.validate_grammar(translate(grammar, pattern), limits=LIMITS)
    except InvalidRequestError as error:
        problem = str(error)
    if problem:
        shown = " ".join(problem.split())[:MAX_ERROR_CHARS]
        raise ConfigError(
            f"--constrained-json-whitespace-pattern {pattern!r} cannot be used: {shown}. "
            f"Give a regular expression such as {JSON_SPACE!r}"
        )
