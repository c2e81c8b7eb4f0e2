"""One request as the scheduler sees it: its tokens, its KV pages and how far it has come."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from sgl.constrained.matcher import Matcher
from sgl.messages import (
    Embed,
    Finish,
    Generate,
    Int32Bytes,
    LogprobOptions,
    RequestId,
    TokenDelta,
    unpack,
)
from sgl.sampling_params import NO_TOKENS, SamplingParams
from sgl.scheduling.radix_cache import Node


@dataclass(slots=True, eq=False)
class Request:
    """
    token_ids  0 ..... num_in_tree ..... num_computed ..... num_planned ..... len
               └ pages of the ┘└ private pages,  ┘└ private pages, KV ┘└ to be ┘
                 radix tree,     KV is there        of steps in flight    planned
                 pinned by node

    `num_sampled` counts the output tokens of all planned steps; those of steps in flight are not
    in `token_ids` yet. A request that decodes has num_planned = prompt_len + num_sampled - 1.
    """

    request_id: RequestId
    prompt_len: int
    token_ids: array[int]
    sampling: SamplingParams
    seed: int
    max_new_tokens: int
    stop_ids: AbstractSet[int]
    arrival: int
    logprobs: LogprobOptions | None = None
    namespace: str = ""
    matcher: Matcher | None = None  # where the answer is in its grammar
    wants_vector: bool = False  # and no tokens

    pages: array[int] = field(default_factory=lambda: array("i"))
    node: Node | None = None
    num_in_tree: int = 0
    num_computed: int = 0
    num_planned: int = 0
    num_sampled: int = 0
    row: int = -1
    is_prefilling: bool = False
    is_finished: bool = False

    num_cached: int = -1  # tokens found in the tree when first admitted; -1 before that
    num_overtaken: int = 0
    num_retractions: int = 0
    next_logprob: int = 0  # first prompt position whose log-probability was not reported yet
    num_told: int = 0  # output tokens that the client was told of
    has_jumped: bool = False
    has_stale_row: bool = False  # the worker's row does not know of the last jump
    max_len: int = field(init=False)  # of prompt and answer

    def __post_init__(self) -> None:
        self.max_len = self.prompt_len + self.max_new_tokens

    @classmethod
    def from_message(
        cls,
        message: Generate,
        *,
        arrival: int,
        seed: int,
        eos_ids: AbstractSet[int],
        max_total_len: int,
        matcher: Matcher | None = None,
    ) -> Request:
        """The request behind a message; its length is cut to what the server can hold."""
        prompt_ids = unpack(message.prompt_ids)
        room = max_total_len - len(prompt_ids)
        wanted = message.sampling.max_new_tokens
        stops = frozenset(message.sampling.stop_token_ids)
        options = message.logprobs
        wants_prompt = options is not None and options.start_len >= 0
        return cls(
            request_id=message.request_id,
            prompt_len=len(prompt_ids),
            token_ids=prompt_ids,
            sampling=message.sampling,
            seed=seed,
            max_new_tokens=room if wanted is None else min(wanted, room),
            stop_ids=frozenset() if message.sampling.ignore_eos else eos_ids | stops,
            arrival=arrival,
            logprobs=options,
            namespace=message.namespace,
            matcher=matcher,
            next_logprob=options.start_len if options and wants_prompt else len(prompt_ids),
        )

    @classmethod
    def for_vector(cls, message: Embed, *, arrival: int) -> Request:
        """A request that ends with its prompt."""
        prompt_ids = unpack(message.prompt_ids)
        return cls(
            request_id=message.request_id,
            prompt_len=len(prompt_ids),
            token_ids=prompt_ids,
            sampling=NO_TOKENS,
            seed=0,
            max_new_tokens=0,
            stop_ids=frozenset(),
            arrival=arrival,
            namespace=message.namespace,
            wants_vector=True,
            next_logprob=len(prompt_ids),
        )

    @property
    def num_output(self) -> int:
        """Output tokens known by now."""
        return len(self.token_ids) - self.prompt_len

    @property
    def is_waiting_for_token(self) -> bool:
        """Whether a step in flight samples a token of this request."""
        return self.num_output < self.num_sampled

    @property
    def is_reserved(self) -> bool:
        """Retracted so often that it is admitted with all the memory it may ever need."""
        return self.num_retractions >= 3

    @property
    def wants_output(self) -> bool:
        """Whether the step that ends its prompt makes anything: a token or a vector."""
        return self.wants_vector or self.max_new_tokens > 0

    @property
    def cache_limit(self) -> int:
        """How many leading tokens may come from the cache: the last one is always computed, and
        a prompt log-probability needs the hidden state of the token before."""
        last = len(self.token_ids) - 1
        if self.next_logprob < self.prompt_len:
            return min(last, max(self.next_logprob - 1, 0))
        return last

    @property
    def limit_met(self) -> Finish | None:
        """The end of an answer whose grammar is too much work from here on."""
        if self.matcher is None or not (why := self.matcher.error):
            return None
        return Finish("abort", message=f"the grammar cannot go on: {why}", status=400)

    def accept(self, token_id: int) -> Finish | None:
        """Record a sampled token; says whether and why it was the last one."""
        finish = self.append([token_id])
        if self.matcher is None:
            return finish
        if finish and finish.kind == "stop":
            return self.limit_met or finish  # there, a mask allows nothing but an end
        ended = self._advance(self.matcher, token_id)
        was_cut = finish and not (ended and ended.kind == "stop")
        return finish if was_cut else ended

    def append(self, token_ids: Iterable[int]) -> Finish | None:
        """Record output tokens up to the last that is allowed, or that ends the answer."""
        for token_id in token_ids:
            self.token_ids.append(token_id)
            if finish := self.end_at(token_id):
                return finish
        return None

    def end_at(self, token_id: int) -> Finish | None:
        """Whether and why the token appended last ends the answer."""
        if len(self.token_ids) >= self.max_len:
            return Finish("length", length=self.max_new_tokens)
        if token_id in self.stop_ids:
            return Finish("stop", matched=token_id)
        return None

    def plan_anew(self) -> None:
        """Forget what was planned of tokens that are not computed yet: they have changed."""
        self.num_planned = self.num_computed
        self.num_sampled = self.num_output
        self.has_jumped = True
        self.is_prefilling = self.has_stale_row = self.row >= 0

    def tell(self) -> Int32Bytes:
        """The output tokens that the client does not know yet; told once."""
        start = self.prompt_len + self.num_told
        self.num_told = self.num_output
        return self.token_ids[start:].tobytes()

    def _advance(self, matcher: Matcher, token_id: int) -> Finish | None:
        """Where nothing can follow, the answer ends without an end-of-sequence token."""
        is_taken = matcher.take([token_id])
        if met := self.limit_met:
            return met
        if not is_taken:
            why = f"the grammar cannot go on: token {token_id} is not allowed"
            return Finish("abort", message=why, status=500)
        return Finish("stop") if matcher.has_ended else None

    def last_delta(self, finish: Finish) -> TokenDelta:
        """What is told of a request that ends without another token."""
        return TokenDelta(self.request_id, b"", finish, max(self.num_cached, 0))
