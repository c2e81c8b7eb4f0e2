"""How `select` decides, from the log-probabilities of each choice's tokens.

Write your own: a subclass of ChoicesSamplingMethod, given as `choices_method=`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

TokenLogprob: TypeAlias = "Sequence[Any]"  # [log-probability or None, token id, text or None]


@dataclass(frozen=True, slots=True)
class ChoicesDecision:
    """
    decision   one of the choices
    meta_info  what `state.get_meta_info` tells
    """

    decision: str
    meta_info: dict[str, Any] = field(default_factory=dict)


class ChoicesSamplingMethod(ABC):
    """Takes one of the choices."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """Whether it wants the log-probabilities of the choices without the text before them."""
        return False

    @abstractmethod
    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[TokenLogprob]],
        output_token_logprobs: Sequence[Sequence[TokenLogprob]],
        unconditional_token_logprobs: Sequence[Sequence[TokenLogprob]] | None = None,
    ) -> ChoicesDecision:
        """
        normalized_prompt_logprobs    of each choice, the mean over its tokens
        input_token_logprobs          of each choice, those of its tokens
        output_token_logprobs         of each choice, those of what was generated after it: nothing
        unconditional_token_logprobs  of each choice, its tokens without the text before them
        """


class TokenLengthNormalized(ChoicesSamplingMethod):
    """The choice whose tokens are likeliest on average."""

    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[TokenLogprob]],
        output_token_logprobs: Sequence[Sequence[TokenLogprob]],
        unconditional_token_logprobs: Sequence[Sequence[TokenLogprob]] | None = None,
    ) -> ChoicesDecision:
        meta = _meta(normalized_prompt_logprobs, input_token_logprobs, output_token_logprobs)
        return ChoicesDecision(choices[_argmax(normalized_prompt_logprobs)], meta)


class GreedyTokenSelection(ChoicesSamplingMethod):
    """The choice that greedy decoding would begin with, token by token.

    A choice that has ended is compared by its mean. Ties go to the first.
    """

    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[TokenLogprob]],
        output_token_logprobs: Sequence[Sequence[TokenLogprob]],
        unconditional_token_logprobs: Sequence[Sequence[TokenLogprob]] | None = None,
    ) -> ChoicesDecision:
        longest = max(map(len, input_token_logprobs))
        rows = [_values(tokens) for tokens in input_token_logprobs]
        matrix = [row + [mean(row)] * (longest - len(row)) for row in rows]
        left = list(range(len(choices)))
        for column in range(longest):
            best = max(matrix[row][column] for row in left)
            left = [row for row in left if matrix[row][column] == best]
        meta = _meta(normalized_prompt_logprobs, input_token_logprobs, output_token_logprobs)
        return ChoicesDecision(choices[left[0]], meta | {"greedy_logprob_matrix": matrix})


class UnconditionalLikelihoodNormalized(ChoicesSamplingMethod):
    """The choice that the text before it makes likelier by most, on average over its tokens.

    https://blog.eleuther.ai/multiple-choice-normalization/
    """

    @property
    def requires_unconditional_logprobs(self) -> bool:
        return True

    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[TokenLogprob]],
        output_token_logprobs: Sequence[Sequence[TokenLogprob]],
        unconditional_token_logprobs: Sequence[Sequence[TokenLogprob]] | None = None,
    ) -> ChoicesDecision:
        if unconditional_token_logprobs is None:
            raise ValueError("unconditional_likelihood_normalized needs unconditional logprobs")
        gains = [
            mean(
                [
                    with_text - without
                    for with_text, without in zip(_values(own), _values(alone), strict=True)
                ]
            )
            for own, alone in zip(input_token_logprobs, unconditional_token_logprobs, strict=True)
        ]
        meta = _meta(normalized_prompt_logprobs, input_token_logprobs, output_token_logprobs)
        meta["unconditional_token_logprobs"] = unconditional_token_logprobs
        meta["normalized_unconditional_prompt_logprobs"] = gains
        return ChoicesDecision(choices[_argmax(gains)], meta)


token_length_normalized = TokenLengthNormalized()
greedy_token_selection = GreedyTokenSelection()
unconditional_likelihood_normalized = UnconditionalLikelihoodNormalized()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _values(tokens: Sequence[TokenLogprob]) -> list[float]:
    """Nothing comes before the first token of a text: it has none, which counts as 0."""
    return [0.0 if token[0] is None else token[0] for token in tokens]


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _meta(
    normalized: Sequence[float],
    of_input: Sequence[Sequence[TokenLogprob]],
    of_output: Sequence[Sequence[TokenLogprob]],
) -> dict[str, Any]:
    return {
        "normalized_prompt_logprobs": normalized,
        "input_token_logprobs": of_input,
        "output_token_logprobs": of_output,
    }
