"""The scheduler actor: feeds the batcher with messages and sends what it decides.

    ingress ── Generate Embed … Control ▶ turn: handle ▸ commit ▸ plan ── StepPlan ──▶ workers
    detokenizer ── Stop ────────────────▶   │                      ▲
                 ◀── OpenText NewTokens ────┘                      └── StepResult ── worker 0

It stays ahead of the worker: while a step runs, the next one is planned and sent already. Orders
to profile or to show a weight pass through to the workers, between two plans, and their replies
back; one to replace the weights waits until nothing runs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import assert_never, cast

from sgl.actors.actor import IDLE_WAIT_S, Context
from sgl.actors.channel import Poller, Receiver, Sender
from sgl.actors.status_page import SchedulerStatus, StatusPage
from sgl.actors.step_log import StepLog, open_trace
from sgl.actors.weights_update import WeightsUpdate
from sgl.constrained.compiler import Compiled, GrammarCompiler
from sgl.constrained.matcher import Matcher, VocabularyFacts, check_json_space
from sgl.errors import InvalidRequestError, RequestError
from sgl.messages import (
    Abort,
    Control,
    DetokenizerToScheduler,
    Embed,
    EngineReady,
    Finish,
    Generate,
    GetWeight,
    IngressToScheduler,
    NewTokens,
    OpenText,
    Reply,
    RequestId,
    SchedulerToDetokenizer,
    SchedulerToWorker,
    StartProfile,
    StepResult,
    StopProfile,
    TokenDelta,
    UpdateWeights,
    WorkerReady,
    WorkerToScheduler,
)
from sgl.scheduling.batcher import Batcher
from sgl.scheduling.kv_store import KvStore
from sgl.scheduling.limits import Limits
from sgl.scheduling.policy import Policy
from sgl.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SPIN_S = 50e-6  # while a step is in flight its result is due soon; sleeping costs 100 µs and more
BLOCKED_WAIT_S = 0.001
CLIENT_LEFT = Finish("abort", message="aborted by the client", status=499)
STOPPED = Finish("stop")


class Scheduler:
    """Wiring around one `Batcher`; it is handed its channels, so a test can hand it others."""

    def __init__(
        self,
        batcher: Batcher,
        *,
        requests: Receiver[IngressToScheduler],
        stops: Receiver[DetokenizerToScheduler],
        results: Receiver[WorkerToScheduler],
        workers: list[Sender[SchedulerToWorker]],
        text: Sender[SchedulerToDetokenizer],
        log: StepLog,
        grammars: GrammarCompiler,
        status: StatusPage | None = None,
    ) -> None:
        self.batcher = batcher
        self.requests = requests
        self.stops = stops
        self.results = results
        self.workers = workers
        self.text = text
        self.log = log
        self.grammars = grammars
        self.status = status
        self.update = WeightsUpdate(batcher)
        self.compiling: dict[RequestId, Generate] = {}  # requests that wait for their grammar
        self.outbox: deque[SchedulerToDetokenizer] = deque()  # what the detokenizer had no room for
        self.unsent: list[deque[SchedulerToWorker]] = [deque() for _ in workers]  # for each worker

    @property
    def is_blocked(self) -> bool:
        """Something waits for room in a ring: the next turn tries again."""
        return bool(self.outbox) or any(self.unsent)

    def turn(self) -> bool:
        """Once around the loop; False means nothing was ready and the process may sleep."""
        results, stops, requests = (
            self.results.receive(),
            self.stops.receive(),
            self.requests.receive(),
        )
        for stop in stops:
            self.batcher.end(stop.request_id, STOPPED)
        for message in requests:
            self.handle(message)
        for request_id, compiled in self.grammars.receive():
            self.start(request_id, compiled)
        for result in results:
            self.take(result)
        self.send()
        has_planned = self.launch()
        if self.status and (results or requests or has_planned):
            self.status.write(self.read_status())
        return bool(results or stops or requests or has_planned)

    def handle(self, message: IngressToScheduler) -> None:
        match message:
            case Generate():
                self.outbox.append(_open_text(message))
                self.queue(message)
            case Embed():
                self.outbox.append(OpenText(message.request_id, interval=0))
                self.add(message, None)
            case Abort():
                self.abort(message.request_id)
            case Control():
                self.control(message)
            case StartProfile() | StopProfile() | GetWeight():
                self.tell_workers(message)
            case UpdateWeights():
                if refusal := self.update.ask(message):
                    self.outbox.append(refusal)
            case _:
                assert_never(message)

    def queue(self, message: Generate) -> None:
        """Give a request to the batcher, once its grammar is compiled."""
        if message.grammar is None:
            self.add(message, None)
        elif matcher := self.grammars.find(message.grammar):
            self.add(message, matcher)
        else:
            self.compiling[message.request_id] = message
            self.grammars.submit(message.request_id, message.grammar)

    def start(self, request_id: RequestId, compiled: Compiled) -> None:
        """Go on with a request whose grammar is compiled, if it is still wanted."""
        if message := self.compiling.pop(request_id, None):
            if isinstance(compiled, RequestError):
                self.refuse(message, compiled)
            else:
                self.add(message, compiled)

    def add(self, message: Generate | Embed, matcher: Matcher | None) -> None:
        try:
            self.batcher.add(message, matcher)
        except RequestError as error:
            self.refuse(message, error)

    def refuse(self, message: Generate | Embed, error: RequestError) -> None:
        """Whoever asked must hear back."""
        finish = Finish("abort", message=str(error), status=error.status)
        self.gain([TokenDelta(message.request_id, b"", finish)])

    def abort(self, request_id: int) -> None:
        if self.compiling.pop(request_id, None):
            self.gain([TokenDelta(request_id, b"", CLIENT_LEFT)])
        if delta := self.batcher.end(request_id, CLIENT_LEFT):
            logger.info("Abort request %d", request_id)
            self.gain([delta])

    def control(self, message: Control) -> None:
        match message.action:
            case "flush_cache":
                self.outbox.append(self._flush_cache(message.call_id))
            case "abort_all":
                request_ids = [*self.compiling, *self.batcher.requests]
                for request_id in request_ids:
                    self.abort(request_id)
                text = f"Aborted {len(request_ids)} requests."
                self.outbox.append(Reply(message.call_id, ok=True, text=text))
            case _:
                assert_never(message.action)

    def take(self, result: WorkerToScheduler) -> None:
        """Commit a step's result, or pass a reply on."""
        match result:
            case StepResult():
                if result.error:
                    logger.error("Step %d failed: %s", result.step, result.error)
                self.gain(self.batcher.commit(result))
                self.log.arrived(result.step, self.batcher.totals.num_output_tokens)
            case Reply():
                self.update.take(result)
                self.outbox.append(result)
            case WorkerReady():
                raise AssertionError("a worker got ready twice")
            case _:
                assert_never(result)

    def launch(self) -> bool:
        """Plan as far ahead as allowed. Clients that read too slowly hold the planning up."""
        self.send_masks()
        if update := self.update.due():
            self.tell_workers(update)
        has_planned = False
        while not self.is_blocked and (plan := self.batcher.plan()):
            self.log.planned(plan, self.batcher)
            self.tell_workers(plan)
            self.send_masks()
            has_planned = True
        return has_planned

    def send_masks(self) -> None:
        """As soon as they can be known: rank 0 waits for them."""
        if masks := self.batcher.due_masks():
            self.unsent[0].append(masks)
            self.send_to_workers()

    def gain(self, deltas: list[TokenDelta]) -> None:
        if deltas:
            self.outbox.append(NewTokens(deltas))

    def send(self) -> None:
        """Send what there is room for; nothing is lost and order is kept."""
        self.send_to_workers()
        while self.outbox and self.text.put(self.outbox[0]):
            self.outbox.popleft()
        self.text.flush()

    def tell_workers(self, message: SchedulerToWorker) -> None:
        """Send to all ranks, behind whatever still waits for room."""
        for unsent in self.unsent:
            unsent.append(message)
        self.send_to_workers()

    def send_to_workers(self) -> None:
        for unsent, worker in zip(self.unsent, self.workers, strict=True):
            while unsent and worker.send(unsent[0]):
                unsent.popleft()

    def read_status(self) -> SchedulerStatus:
        batcher, totals = self.batcher, self.batcher.totals
        store = batcher.store
        num_used = store.num_pages - store.num_available
        prompt_tokens = totals.num_prefill_tokens + totals.num_cached_tokens
        return SchedulerStatus(
            num_running_reqs=len(batcher.running),
            num_queue_reqs=len(batcher.waiting),
            num_used_tokens=num_used * store.page_size,
            max_total_tokens=store.num_pages * store.page_size,
            token_usage=num_used / store.num_pages,
            gen_throughput=self.log.throughput if batcher.in_flight or batcher.running else 0.0,
            cache_hit_rate=totals.num_cached_tokens / prompt_tokens if prompt_tokens else 0.0,
            num_retractions=totals.num_retractions,
            num_steps=totals.num_steps,
            num_in_flight=len(batcher.in_flight),
            num_prefill_tokens=totals.num_prefill_tokens,
            num_cached_tokens=totals.num_cached_tokens,
            num_output_tokens=totals.num_output_tokens,
            num_jumped_tokens=totals.num_jumped_tokens,
            num_saved_passes=totals.num_saved_passes,
            is_loading=self.update.is_under_way,
        )

    def _flush_cache(self, call_id: int) -> Reply:
        if self.batcher.flush():
            self.grammars.forget()
            logger.info("Cache flushed")
            return Reply(call_id, ok=True, text="Cache flushed.")
        text = (
            f"Cache not flushed: {len(self.batcher.running)} requests are running and "
            f"{len(self.batcher.waiting)} are waiting. Try again when there are none."
        )
        return Reply(call_id, ok=False, text=text)


def run(context: Context) -> None:
    """The process: wait for the workers, then turn for ever."""
    check_json_space(context.config.constrained_json_whitespace_pattern)
    requests = context.receiver("ingress->scheduler", IngressToScheduler)
    stops = context.receiver("detokenizer->scheduler", DetokenizerToScheduler)
    results = context.receiver("worker0->scheduler", WorkerToScheduler)
    text = context.sender("scheduler->detokenizer")
    num_workers = context.config.tp_size
    tokenizer = context.load_tokenizer()
    eos_ids = frozenset(context.model_config.eos_ids) | (tokenizer.eos_ids if tokenizer else set())
    batcher = _make_batcher(context, eos_ids, num_pages=_wait_for_worker(results))
    grammars = GrammarCompiler(lambda: _vocabulary_facts(context, tokenizer, eos_ids))
    scheduler = Scheduler(
        batcher,
        requests=requests,
        stops=stops,
        results=results,
        workers=[context.sender(f"scheduler->worker{rank}") for rank in range(num_workers)],
        text=text,
        log=StepLog(
            context.config.decode_log_interval,
            open_trace(context.config.trace_steps),
            time.monotonic,
        ),
        grammars=grammars,
        status=context.status,
    )
    max_tokens = batcher.store.num_pages * batcher.store.page_size
    text.send(EngineReady(max_tokens, batcher.limits.max_total_len))
    context.status.write(scheduler.read_status())
    context.ready(f"{max_tokens} tokens of KV cache")
    context.run_turns(
        scheduler.turn,
        Poller([requests, stops, results, grammars]),
        idle_wait_s=lambda: BLOCKED_WAIT_S if scheduler.is_blocked else IDLE_WAIT_S,
        spin_s=lambda: SPIN_S if batcher.in_flight else 0.0,
    )


def _make_batcher(context: Context, eos_ids: frozenset[int], num_pages: int) -> Batcher:
    config, limits = context.config, context.limits
    max_tokens = num_pages * config.page_size
    return Batcher(
        KvStore(num_pages, config.page_size, is_cached=not config.disable_radix_cache),
        Limits(
            max_step_tokens=limits.max_step_tokens,
            min_prompt_tokens=limits.min_prefill_tokens,
            max_rows=limits.max_running_requests,
            max_total_len=min(context.context_len, max_tokens),
            max_in_flight=1 if config.disable_overlap_schedule else 2,
        ),
        policy=cast(Policy, config.schedule_policy),
        conservativeness=config.schedule_conservativeness,
        eos_ids=eos_ids,
        seed=context.bootstrap.random_seed,
        jumps_forward=not config.disable_jump_forward,
    )


def _vocabulary_facts(
    context: Context, tokenizer: Tokenizer | None, eos_ids: frozenset[int]
) -> VocabularyFacts:
    if tokenizer is None:
        raise InvalidRequestError(
            "grammars need the tokenizer, and this server runs without one (--skip-tokenizer-init)"
        )
    return VocabularyFacts(
        tokenizer.to_json(),
        context.model_config.vocab_size,
        tuple(sorted(eos_ids)),
        context.config.constrained_json_whitespace_pattern,
    )


def _wait_for_worker(results: Receiver[WorkerToScheduler]) -> int:
    """Pages of KV that rank 0 allocated; it says so once the model is loaded on all ranks."""
    poller = Poller([results])
    while not (messages := results.receive()):
        poller.wait(None)
    match messages[0]:
        case WorkerReady(num_pages=num_pages):
            return num_pages
        case StepResult() | Reply():
            raise AssertionError("a worker sent a result before it was ready")
        case _:
            assert_never(messages[0])


def _open_text(message: Generate) -> OpenText:
    sampling = message.sampling
    return OpenText(
        message.request_id,
        sampling.stop,
        sampling.skip_special_tokens,
        sampling.no_stop_trim,
        message.text_interval,
        message.kept_ids,
    )
