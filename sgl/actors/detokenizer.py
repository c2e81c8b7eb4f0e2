"""The detokenizer actor: token ids from the scheduler become text for the ingress.

    scheduler ── OpenText NewTokens ──▶ one _Stream per request ── NewText ──▶ ingress
              ◀── Stop ────────────────┘ (a stop string was seen)
              ── Reply EngineReady ──────────────────────────────────────────▶

All text of a turn leaves as one message. While the ingress takes none, the text of each request
grows in its stream and leaves later as one larger delta: nothing is lost and nothing overtakes.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import TypeVar, assert_never

from sgl.actors.actor import IDLE_WAIT_S, Context
from sgl.actors.channel import Poller, Receiver, Sender
from sgl.messages import (
    DetokenizerToIngress,
    DetokenizerToScheduler,
    EngineReady,
    Finish,
    Logprobs,
    NewText,
    NewTokens,
    OpenText,
    Reply,
    RequestId,
    SchedulerToDetokenizer,
    Stop,
    TextDelta,
    TokenDelta,
    unpack,
)
from sgl.text_stream import TextStream, TokenBytes

T = TypeVar("T")

BLOCKED_WAIT_S = 0.001


class Detokenizer:
    """One per engine. Without a tokenizer the texts are empty and only the ids pass through."""

    def __init__(
        self,
        tokenizer: TokenBytes | None,
        from_scheduler: Receiver[SchedulerToDetokenizer],
        to_scheduler: Sender[DetokenizerToScheduler],
        to_ingress: Sender[DetokenizerToIngress],
    ) -> None:
        self._tokenizer = tokenizer
        self._from_scheduler = from_scheduler
        self._to_scheduler = to_scheduler
        self._to_ingress = to_ingress
        self._streams: dict[RequestId, _Stream] = {}  # those that expect tokens
        self._due: dict[RequestId, _Stream] = {}  # those with something to send, oldest first
        self._replies: deque[DetokenizerToIngress] = deque()
        self._stops: deque[DetokenizerToScheduler] = deque()

    @property
    def is_blocked(self) -> bool:
        """Something could not be sent: the next turn tries again, so do not sleep for long."""
        return bool(self._due or self._replies or self._stops)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def turn(self) -> bool:
        """Once around the loop; False means nothing was ready and the process may sleep."""
        received = self._from_scheduler.receive()
        for message in received:
            self._handle(message)
        has_sent = self._send() if self.is_blocked else False
        return bool(received) or has_sent

    def _handle(self, message: SchedulerToDetokenizer) -> None:
        match message:
            case NewTokens():
                for delta in message.deltas:
                    self._accept(delta)
            case OpenText():
                self._streams[message.request_id] = _Stream(message, self._tokenizer)
            case Reply() | EngineReady():
                self._replies.append(message)
            case _:
                assert_never(message)

    def _accept(self, delta: TokenDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return  # it ended by a stop string, and the scheduler did not know yet
        stream.add(delta)
        if stream.finish is not None:
            del self._streams[delta.request_id]
            if delta.finish is None:
                self._stops.append(Stop(delta.request_id))
        if stream.is_due:
            self._due[delta.request_id] = stream

    def _send(self) -> bool:
        num_stops = _send_all(self._stops, self._to_scheduler)
        if num_stops:
            self._to_scheduler.flush()
        num_texts = self._send_due()
        # A reply must not overtake the text of what it answers ("all requests are aborted").
        num_replies = 0 if self._due else _send_all(self._replies, self._to_ingress)
        if num_texts or num_replies:
            self._to_ingress.flush()
        return bool(num_stops or num_texts or num_replies)

    def _send_due(self) -> int:
        if not self._due:
            return 0
        streams = list(self._due.values())
        if not self._to_ingress.put(NewText([stream.delta() for stream in streams])):
            return 0
        for stream in streams:
            stream.clear()
        self._due.clear()
        return len(streams)


def _send_all(queue: deque[T], sender: Sender[T]) -> int:
    """Send in order while the channel takes it; how many went."""
    num_sent = 0
    while queue and sender.put(queue[0]):
        queue.popleft()
        num_sent += 1
    return num_sent


@dataclass(slots=True)
class _Unsent:
    """What one request gained since its last delta."""

    texts: list[str] = field(default_factory=list)
    token_ids: bytearray = field(default_factory=bytearray)
    input_logprobs: list[Logprobs] = field(default_factory=list)
    output_logprobs: list[Logprobs] = field(default_factory=list)
    vector: bytes = b""


class _Stream:
    """One request: its text so far, and what of it the ingress has not got."""

    def __init__(self, opened: OpenText, tokenizer: TokenBytes | None) -> None:
        self.finish: Finish | None = None
        self._request_id = opened.request_id
        self._interval_len = 4 * opened.interval  # in bytes of token ids
        self._num_cached = 0
        self._unsent = _Unsent()
        self._text: TextStream | None = None
        if tokenizer is not None:
            self._text = TextStream(
                tokenizer,
                opened.stop,
                opened.skip_special_tokens,
                opened.no_stop_trim,
                opened.kept_ids,
            )

    @property
    def is_due(self) -> bool:
        if self.finish is not None:
            return True
        return 0 < self._interval_len <= len(self._unsent.token_ids)

    def add(self, delta: TokenDelta) -> None:
        """Take new tokens; those after a stop string are dropped with their log-probabilities."""
        self.finish = delta.finish
        self._num_cached = delta.num_cached or self._num_cached
        if self._text is not None:
            num_kept = self._read(self._text, unpack(delta.token_ids), delta.finish)
            delta = _first_tokens(delta, num_kept)
        unsent = self._unsent
        unsent.token_ids += delta.token_ids
        unsent.vector = delta.vector
        if delta.input_logprobs is not None:
            unsent.input_logprobs.append(delta.input_logprobs)
        if delta.output_logprobs is not None:
            unsent.output_logprobs.append(delta.output_logprobs)

    def delta(self) -> TextDelta:
        unsent = self._unsent
        return TextDelta(
            request_id=self._request_id,
            text="".join(unsent.texts),
            token_ids=bytes(unsent.token_ids),
            finish=self.finish,
            num_cached=self._num_cached,
            input_logprobs=unsent.input_logprobs,
            output_logprobs=unsent.output_logprobs,
            vector=unsent.vector,
        )

    def clear(self) -> None:
        """The delta has been sent."""
        self._unsent = _Unsent()

    def _read(self, text: TextStream, ids: array[int], finish: Finish | None) -> int:
        """Add the text of `ids`; how many of them belong to the answer."""
        num_before = text.num_tokens
        if finish is None:
            self._unsent.texts.append(text.push(ids))
        else:
            stop_id = ids.pop() if ids and isinstance(finish.matched, int) else None
            self._unsent.texts += text.push(ids), text.finish(stop_id)
        if text.matched is not None:
            self.finish = Finish("stop", matched=text.matched)
        return text.num_tokens - num_before


def _first_tokens(delta: TokenDelta, num_kept: int) -> TokenDelta:
    num_tokens = len(delta.token_ids) // 4
    if num_kept == num_tokens:
        return delta
    logprobs = delta.output_logprobs
    return TokenDelta(
        request_id=delta.request_id,
        token_ids=delta.token_ids[: 4 * num_kept],
        input_logprobs=delta.input_logprobs,
        output_logprobs=logprobs and _first_logprobs(logprobs, num_kept, num_tokens),
    )


def _first_logprobs(logprobs: Logprobs, num_kept: int, num_tokens: int) -> Logprobs:
    """Each field holds as many bytes for every token."""
    fields = (
        logprobs.values,
        logprobs.top_values,
        logprobs.top_ids,
        logprobs.chosen_values,
    )
    return Logprobs(*(data[: len(data) // num_tokens * num_kept] for data in fields))


def run(context: Context) -> None:
    """The process."""
    from_scheduler = context.receiver("scheduler->detokenizer", SchedulerToDetokenizer)
    detokenizer = Detokenizer(
        context.load_tokenizer(),
        from_scheduler,
        context.sender("detokenizer->scheduler"),
        context.sender("detokenizer->ingress"),
    )
    context.ready()
    context.run_turns(
        detokenizer.turn,
        Poller([from_scheduler]),
        idle_wait_s=lambda: BLOCKED_WAIT_S if detokenizer.is_blocked else IDLE_WAIT_S,
    )
