"""The client's side of the engine, inside one event loop: calls in, growing answers out.

    submit(call) ── Generate or Embed, for each sample of each prompt ──▶ scheduler
        │               Abort, and every Question
        ▼
    RunningCall ◀── receive(messages) ◀── NewText, Reply, EngineReady ── detokenizer

Used by the ingress, and by `Engine` without HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol, assert_never

import msgspec

from sgl.actors.live_requests import LiveRequest, LiveRequests
from sgl.actors.prompt_encoder import PromptEncoder, TextTokenizer
from sgl.actors.prompt_limits import PromptLimits
from sgl.actors.questions import Questions
from sgl.actors.request_log import RequestLog
from sgl.actors.running_call import RunningCall
from sgl.actors.sessions import SessionLimits, Sessions, Turn
from sgl.errors import EngineError, InvalidRequestError, OverloadedError, RequestError
from sgl.messages import (
    Abort,
    Control,
    DetokenizerToIngress,
    Embed,
    EngineReady,
    Finish,
    Generate,
    IngressToScheduler,
    NewText,
    Question,
    Reply,
    StartProfile,
    StopProfile,
    TextDelta,
)
from sgl.metrics import RequestCounts
from sgl.protocol.call import CLIENT_ABORT_STATUS, Answer, GenerationCall, PromptCall
from sgl.protocol.profile import ProfileRequest
from sgl.protocol.session import OpenSession
from sgl.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

SEND_RETRY_S = 0.001


class SchedulerSender(Protocol):
    """Where requests go. False means that the ring is full and the message was not taken."""

    def put(self, message: IngressToScheduler) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontOptions:
    """What the front is told at the start.

    max_live_requests   answers in the making at a time; more are refused with 503
    max_batch_requests  answers that one call may ask for: prompts times n
    stream_interval     text is sent every so many tokens
    is_pooled           the model gives vectors, and no tokens
    max_sessions        open at a time; session_timeout: seconds until an unused one is closed
    """

    context_len: int
    vocab_size: int
    max_live_requests: int
    max_batch_requests: int
    stream_interval: int = 1
    allow_auto_truncate: bool = False
    is_pooled: bool = False
    max_sessions: int = 1024
    session_timeout: float = 3600.0
    log_requests: bool = False
    log_requests_level: int = 0


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A prompt that passed all checks.

    turn  where it goes in a session; a `Finish` says why it goes nowhere, and is its answer
    """

    call: PromptCall
    rid: str
    ids: array[int]
    sampling: SamplingParams
    turn: Turn | Finish | None


class Front:
    """Submits calls to the engine and hands its answers to whoever waits for them."""

    def __init__(
        self,
        to_scheduler: SchedulerSender,
        tokenizer: TextTokenizer | None,
        options: FrontOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = RequestCounts()
        self.ready = asyncio.Event()
        self.limits: PromptLimits | None = None
        self.max_total_tokens = 0
        self._to_scheduler = to_scheduler
        self._encoder = PromptEncoder(tokenizer)
        self.sessions = Sessions(
            SessionLimits(options.max_sessions, options.session_timeout),
            self._encoder,
            clock,
        )
        self.request_log = RequestLog(is_on=options.log_requests, level=options.log_requests_level)
        self._options = options
        self._clock = clock
        self._death: EngineError | None = None
        self._request_ids = itertools.count(1)
        self._live = LiveRequests(options.max_live_requests, options.max_batch_requests)
        self._questions = Questions(self._send)
        self._unsent: deque[IngressToScheduler] = deque()  # what the ring had no room for

    @property
    def num_live(self) -> int:
        """Answers in the making."""
        return len(self._live)

    @property
    def max_live(self) -> int:
        return self._options.max_live_requests

    @property
    def is_pooled(self) -> bool:
        """Calls must want vectors; else they must not."""
        return self._options.is_pooled

    @property
    def vocab_size(self) -> int:
        return self._options.vocab_size

    @property
    def is_dead(self) -> bool:
        return self._death is not None

    async def submit(self, call: GenerationCall) -> RunningCall:
        """Start a call. All of it is checked before any of it is sent; raises RequestError."""
        limits = self._open_limits()
        self._check_kind(wants_vectors=call.wants_vectors)
        with ExitStack() as undo:
            rids = self._live.take(call, undo)
            prompts = await self._encoder.encode(call, limits)
            prepared = [
                self._prepare(prompt, rid, ids, limits)
                for prompt, rid, ids in zip(call.prompts, rids, prompts, strict=True)
            ]
            self._open_limits()  # the engine may have died meanwhile
            running = self._start(call, prepared)
            undo.pop_all()
        return running

    def open_session(self, wanted: OpenSession) -> str:
        """The id of a new session; raises RequestError."""
        self._check_kind(wants_vectors=False)
        return self.sessions.open(wanted)

    def abort(self, rid: str) -> bool:
        """End the answers of a prompt, keeping their text; False if there are none."""
        request_ids = self._live.named(rid)
        self._abort_requests(request_ids, f"rid={rid} on request")
        return bool(request_ids)

    def abort_all(self) -> int:
        """End every answer in the making; says how many there were."""
        request_ids = [request_id for request_id, _ in self._live]
        self._abort_requests(request_ids, "all on request")
        return len(request_ids)

    def fail_all(self, error: EngineError) -> None:
        """Whoever waits gets `error` now, and so does whoever comes; the engine is told to stop."""
        for request_id, _ in self._live:
            self._send(Abort(request_id))
        self._fail(error)

    async def ask(self, make: Callable[[int], Question]) -> Reply:
        """The engine's reply to the message that `make` makes with the call_id it is given."""
        self._open_limits()
        return await self._questions.ask(make)

    async def control(self, action: Literal["flush_cache", "abort_all"]) -> Reply:
        """The engine's answer to an operator's wish."""
        return await self.ask(lambda call_id: Control(call_id, action))

    async def start_profile(self, wanted: ProfileRequest) -> Reply:
        """Whether the workers record their steps now."""
        stamp = f"{datetime.now():%Y%m%d-%H%M%S-%f}"
        folder, num_steps = wanted.output_dir, wanted.num_steps
        activities = wanted.activities or ()
        return await self.ask(
            lambda call_id: StartProfile(call_id, stamp, folder, num_steps, activities)
        )

    async def stop_profile(self) -> Reply:
        """Where the workers have written what they recorded."""
        return await self.ask(StopProfile)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no answer is in the making; False if some still are."""
        return await self._live.wait_idle(timeout_s)

    def receive(self, messages: Iterable[DetokenizerToIngress]) -> None:
        """Hand out what the engine sent."""
        for message in messages:
            match message:
                case NewText():
                    for delta in message.deltas:
                        self._deliver(delta)
                case Reply():
                    self._questions.answer(message)
                case EngineReady():
                    self._open(message)
                case _:
                    assert_never(message)

    def engine_died(self, reason: str) -> None:
        """Everybody who waits gets an EngineError now, and so does everybody who comes."""
        self._fail(EngineError(f"the engine has stopped: {reason}"))

    def close(self) -> None:
        self._encoder.close()
        self.request_log.close()

    def _fail(self, error: EngineError) -> None:
        self._death = error
        self._fail_live(error)
        self._questions.fail(error)

    def _open(self, ready: EngineReady) -> None:
        self.max_total_tokens = ready.max_total_tokens
        self.limits = PromptLimits(
            context_len=self._options.context_len,
            max_request_tokens=ready.max_request_tokens,
            vocab_size=self._options.vocab_size,
            allow_auto_truncate=self._options.allow_auto_truncate,
            min_answer_len=0 if self.is_pooled else 1,
        )
        self.ready.set()

    def _open_limits(self) -> PromptLimits:
        if self._death is not None:
            raise self._death
        if self.limits is None:
            raise OverloadedError("the model is still being loaded: try again in a few seconds")
        return self.limits

    def _check_kind(self, *, wants_vectors: bool) -> None:
        if self.is_pooled and not wants_vectors:
            raise InvalidRequestError(
                "this server's model gives vectors of texts and generates none: send texts to "
                "/v1/embeddings, /encode or /classify"
            )
        if wants_vectors and not self.is_pooled:
            raise InvalidRequestError(
                "this server's model is not served as an embedding model: start the server with "
                "--is-embedding to get vectors of texts"
            )

    def _prepare(
        self, call: PromptCall, rid: str, ids: array[int], limits: PromptLimits
    ) -> _Prepared:
        turn = None if call.session is None else self.sessions.find(call.session)
        if isinstance(turn, Turn):
            ids = limits.cut(self.sessions.prompt(turn, ids))
            self.sessions.check(turn, rid, ids)
        else:
            ids = limits.cut(ids)
        limits.check_logprobs(call.logprobs, len(ids))
        return _Prepared(call, rid, ids, limits.sampling(call, len(ids)), turn)

    def _start(self, call: GenerationCall, prompts: Sequence[_Prepared]) -> RunningCall:
        answers = [
            Answer(
                index=number * call.n + sample,
                rid=prompt.rid if call.n == 1 else f"{prompt.rid}-{sample}",
                prompt_ids=prompt.ids,
                logprob_options=prompt.call.logprobs,
            )
            for number, prompt in enumerate(prompts)
            for sample in range(call.n)
        ]
        running = RunningCall(answers, self._abandon)
        for answer in answers:
            prompt = prompts[answer.index // call.n]
            request_id = next(self._request_ids)
            live = LiveRequest(running, answer, prompt.call, prompt.rid, self._clock(), call.stream)
            self._live.start(request_id, live)
            if isinstance(prompt.turn, Finish):
                self._deliver(TextDelta(request_id, "", b"", prompt.turn))
                continue
            if prompt.turn is not None:
                self._abort_requests(prompt.turn.interrupted(), "replaced in their session")
                live.node = self.sessions.begin(prompt.turn, prompt.rid, request_id, answer)
            self._send(self._message(request_id, prompt, call, answer.index % call.n))
        self.counts.num_requests += len(answers)
        self.counts.num_prompt_tokens += sum(len(answer.prompt_ids) for answer in answers)
        return running

    def _message(
        self, request_id: int, prompt: _Prepared, call: GenerationCall, sample: int
    ) -> Generate | Embed:
        if call.wants_vectors:
            return Embed(request_id, prompt.ids.tobytes(), call.namespace)
        return Generate(
            request_id=request_id,
            prompt_ids=prompt.ids.tobytes(),
            sampling=_for_sample(prompt.sampling, sample),
            logprobs=prompt.call.logprobs,
            namespace=call.namespace,
            text_interval=self._options.stream_interval if call.stream else 0,
            grammar=prompt.call.grammar,
            kept_ids=prompt.call.kept_ids,
        )

    def _deliver(self, delta: TextDelta) -> None:
        live = self._live.get(delta.request_id)
        if live is None:
            return  # aborted here; the engine had sent this before it heard of it
        self._measure(live, delta)
        live.call.add(live.answer, delta)
        if delta.finish is not None:
            self._live.forget(delta.request_id)
            if live.node is not None:
                self.sessions.end(live.node)
            self.request_log.ended(live.prompt, live.answer, self._clock() - live.started)

    def _measure(self, live: LiveRequest, delta: TextDelta) -> None:
        now, counts, num_tokens = self._clock(), self.counts, len(delta.token_ids) // 4
        counts.num_generated_tokens += num_tokens
        if num_tokens and live.is_stream:
            if live.latest is None:
                counts.time_to_first_token.observe(now - live.started)
            else:
                counts.inter_token_latency.observe((now - live.latest) / num_tokens, num_tokens)
            live.latest = now
        if delta.finish is not None:
            counts.end_to_end_latency.observe(now - live.started)
            counts.num_cached_tokens += max(delta.num_cached, live.answer.num_cached)
            counts.num_aborted += delta.finish.kind == "abort"

    def _abandon(self, call: RunningCall) -> None:
        """The client of `call` has left."""
        mine = [(request_id, live.rid) for request_id, live in self._live if live.call is call]
        rids = ",".join(sorted({rid for _, rid in mine}))
        self._abort_requests([request_id for request_id, _ in mine], f"rid={rids}: its client left")

    def _abort_requests(self, request_ids: Sequence[int], reason: str) -> None:
        if not request_ids:
            return
        logger.info("Abort %.200s (%d requests)", reason, len(request_ids))
        finish = Finish("abort", message="Abort: on request", status=CLIENT_ABORT_STATUS)
        for request_id in request_ids:
            self._send(Abort(request_id))
            self._deliver(TextDelta(request_id, "", b"", finish))

    def _send(self, message: IngressToScheduler) -> None:
        """Nothing is dropped: where the ring is full, it is sent a little later, in order.

        How much can wait here is bounded by how many answers may be in the making.
        """
        self._unsent.append(message)
        if len(self._unsent) == 1:
            self._send_waiting()

    def _send_waiting(self) -> None:
        while self._unsent and self._to_scheduler.put(self._unsent[0]):
            self._unsent.popleft()
        if self._unsent and not self.is_dead:
            asyncio.get_running_loop().call_later(SEND_RETRY_S, self._send_waiting)

    def _fail_live(self, error: RequestError) -> None:
        for request_id, live in self._live:
            live.call.fail(error)
            self._live.forget(request_id)


def _for_sample(sampling: SamplingParams, sample: int) -> SamplingParams:
    """With one seed for n samples each gets its own, or all would be the same."""
    if sampling.seed is None or sample == 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + sample) % 2**63)
