"""Jump-forward: text that a grammar forces is computed in one pass, not sampled token by token.

    step N samples t; the grammar leaves only one way to go on: the tokens f f f
    step N + 1, in flight, computes t and samples what follows: dropped
    step N + 2 computes the chunk t f f f and samples after it

The idea is that of the compressed finite state machine
(https://lmsys.org/blog/2024-02-05-compressed-fsm), on a grammar of bytes. Across the seam on the
right, a tail of the forced text that could be the beginning of a longer token is left to be
sampled. On the left, the token that was sampled stays, unlike there: written anew together with
what follows it, the text often begins with a token that the model finds far less likely, and many
greedy answers go another way (docs/adr/0014).
"""

from __future__ import annotations

from dataclasses import dataclass

from sgl.messages import Finish
from sgl.scheduling.request import Request

LEAST_FORCED = 2  # a jump drops the token of the step in flight, so one forced token wins nothing


@dataclass(frozen=True, slots=True)
class Jump:
    """What a jump did: tokens taken without sampling them, and how the request ended, if it did."""

    num_tokens: int
    finish: Finish | None


def jump(request: Request) -> Jump | None:
    """Append what must follow the token that was just sampled; None where that is too little."""
    matcher = request.matcher
    if matcher is None or request.logprobs is not None:  # each token is reported as it was sampled
        return None
    forced = matcher.forced()
    if len(forced) < LEAST_FORCED or not matcher.take(forced):
        return None
    num_known = request.num_output
    finish = request.append(forced)
    num_taken = request.num_output - num_known
    request.plan_anew()
    if matcher.has_ended and num_taken == len(forced) and not (finish and finish.kind == "stop"):
        finish = Finish("stop")  # its own end: nothing was cut off
    return Jump(num_taken, finish)


def begin(request: Request) -> int:
    """Append what every answer begins with, before anything is computed; how many tokens.

    At least one token is left to be sampled.
    """
    matcher = request.matcher
    if matcher is None or request.logprobs is not None:
        return 0
    taken = _until_stop(matcher.forced(), request)[: max(request.max_new_tokens - 1, 0)]
    if not taken or not matcher.take(taken):
        return 0
    if matcher.has_ended:
        matcher.take_back(1)
        taken.pop()
    request.token_ids.extend(taken)
    request.num_sampled = len(taken)
    return len(taken)


def _until_stop(ids: list[int], request: Request) -> list[int]:
    for index, token_id in enumerate(ids):
        if token_id in request.stop_ids:
            return ids[:index]
    return ids
