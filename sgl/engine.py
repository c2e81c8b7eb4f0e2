"""The engine without HTTP: `sgl.Engine` in a script, a notebook or an event loop of one's own.

    caller's thread ── generate ──▶ the engine's thread: event loop, Front ── rings ──▶ actors

The same processes as behind the server, and no guard in the caller's script: they are started as
programs of their own, not by importing the script again. All of it lives on a thread of the
engine's, so a running event loop of the caller's (a notebook's) is no obstacle.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import orjson

from sgl.actors.channel import Inbox, Receiver, Sender, TickSender
from sgl.actors.chat_format import format_of, load_template
from sgl.actors.front import Front, FrontOptions
from sgl.actors.group import ActorGroup
from sgl.actors.questions import told
from sgl.actors.served_weights import ServedWeights
from sgl.config import ServerConfig
from sgl.errors import ActorDiedError, EngineError, InvalidRequestError
from sgl.messages import DetokenizerToIngress, IngressToScheduler
from sgl.models.config import ModelConfig
from sgl.protocol.administration import WeightRequest, WeightsRequest
from sgl.protocol.body import convert
from sgl.protocol.call import Answer
from sgl.protocol.encode import EncodeReply, EncodeRequest, encode_request
from sgl.protocol.native import GenerateRequest, generate_request
from sgl.protocol.native_reply import NativeReply
from sgl.protocol.profile import ProfileRequest
from sgl.protocol.session import OpenSession
from sgl.tokenizer import Tokenizer

T = TypeVar("T")
Output = dict[str, Any]

POLL_S = 0.05
FAREWELL_S = 5.0  # for those who wait to hear that the engine is no more
WATCH_EVERY_S = 0.5
MAX_LIVE_REQUESTS = 1_000_000  # the caller's own memory is the limit


class Engine:
    """A model in processes of this program's own. Keywords are the server's flags.

        with sgl.Engine(model_path="…") as engine:
            print(engine.generate("The capital of France is")["text"])

    Raises ConfigError if it cannot start as asked. `shutdown` ends its processes, and nothing else.
    """

    def __init__(self, log_level: str = "error", **flags: object) -> None:
        self._config = ServerConfig.from_kwargs(log_level=log_level, **flags)
        self._loop = asyncio.new_event_loop()
        self._started: Future[None] = Future()
        self._stop = asyncio.Event()
        self._is_over = False  # whoever comes now would not be heard
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._live, name="sgl-engine", daemon=True)
        self._thread.start()
        self._started.result()
        atexit.register(self.shutdown)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """Answer one prompt (a dict) or a list of them (a list, in order), as `/generate` does.

        With `stream`, an iterator of dicts whose texts grow. `fields` are further fields of
        `/generate`, such as return_logprob. Raises RequestError.
        """
        request = _request(prompt, sampling_params, input_ids, stream, fields)
        if stream:
            return self._iterate(request)
        return self._wait_for(self._answer(request))

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """As `generate`, from an event loop; with `stream`, awaiting gives an async iterator."""
        request = _request(prompt, sampling_params, input_ids, stream, fields)
        if stream:
            return self._iterate_async(request)
        return await asyncio.wrap_future(self._submit(self._answer(request)))

    def encode(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **fields: Any,
    ) -> Any:
        """A vector of one prompt (a dict) or of each (a list, in order), as `/encode` gives them.

        Needs a model that gives vectors, or is_embedding=True. Raises RequestError.
        """
        request = encode_request({"text": prompt, "input_ids": input_ids} | fields)
        return self._wait_for(self._encode(request))

    async def async_encode(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **fields: Any,
    ) -> Any:
        """As `encode`, from an event loop."""
        request = encode_request({"text": prompt, "input_ids": input_ids} | fields)
        return await asyncio.wrap_future(self._submit(self._encode(request)))

    def flush_cache(self) -> bool:
        """Forget all cached prefixes; False (and nothing done) while requests are running."""
        return self._wait_for(self._front.control("flush_cache")).ok

    def start_profile(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        num_steps: int | None = None,
        activities: Sequence[str] | None = None,
    ) -> str:
        """Record the steps from now on, as `/start_profile` does; says where the traces will be.

        Raises InvalidRequestError where that is not possible.
        """
        fields = {
            "output_dir": None if output_dir is None else os.fspath(output_dir),
            "num_steps": num_steps,
            "activities": activities,
        }
        wanted = convert(fields, ProfileRequest)
        return told(self._wait_for(self._front.start_profile(wanted)))

    def stop_profile(self) -> str:
        """Write what was recorded and say where; raises InvalidRequestError if nothing was."""
        return told(self._wait_for(self._front.stop_profile()))

    def update_weights_from_disk(
        self, model_path: str | os.PathLike[str], load_format: str | None = None
    ) -> str:
        """Replace the weights by those of another checkpoint of the model, once nothing runs.

        Requests that come meanwhile wait. Raises InvalidRequestError, and all is as it was.
        """
        fields = {"model_path": os.fspath(model_path), "load_format": load_format}
        return self._wait_for(self._weights.update(convert(fields, WeightsRequest)))

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[Any]:
        """The first rows of a weight, called as in its checkpoint; raises InvalidRequestError."""
        wanted = convert({"name": name, "truncate_size": truncate_size}, WeightRequest)
        rows: list[Any] = orjson.loads(self._wait_for(self._weights.show(wanted)))
        return rows

    def open_session(self, capacity_of_str_len: int, session_id: str | None = None) -> str:
        """The id of a new session, for `session_params` of `generate`; raises RequestError."""
        fields = {"capacity_of_str_len": capacity_of_str_len, "session_id": session_id}
        wanted = convert(fields, OpenSession)
        return self._wait_for(_call(lambda: self._front.open_session(wanted)))

    def close_session(self, session_id: str) -> None:
        """Forget a session; nothing happens if it is not open."""
        self._wait_for(_call(lambda: self._front.sessions.close(session_id)))

    def tokenize(
        self, prompt: str | Sequence[str], add_special_tokens: bool = True
    ) -> list[int] | list[list[int]]:
        """Token ids of a text, or of each; raises InvalidRequestError without a tokenizer."""
        if self._tokenizer is None:
            raise InvalidRequestError("this engine runs without a tokenizer: give input_ids")
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt, add_special_tokens).tolist()
        return [self._tokenizer.encode(one, add_special_tokens).tolist() for one in prompt]

    def get_model_info(self) -> dict[str, Any]:
        """Where the model comes from and how it writes conversations, as /get_model_info says."""
        template = load_template(self._config.chat_template, self._tokenizer)
        return {
            "model_path": self._weights.path,
            "tokenizer_path": self._group.paths["tokenizer"],
            "is_generation": not self._front.is_pooled,
            "keeps_tokens": self._tokenizer is not None and not self._front.is_pooled,
            "chat_format": format_of(template, self._tokenizer),
        }

    def get_server_info(self) -> dict[str, Any]:
        """The settings, and the scheduler's numbers at this moment."""
        if self._is_over:
            raise _shut_down()
        if self._front.is_dead:
            raise EngineError("the engine has stopped")
        status = self._group.status.read()
        limits = {"max_total_num_tokens": self._front.max_total_tokens}
        settings = self._config.public_values() | self._weights.settings()
        return settings | limits | msgspec.structs.asdict(status)

    def shutdown(self) -> None:
        """End the engine's processes. May be called more than once."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        atexit.unregister(self.shutdown)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _live(self) -> None:
        """The engine's thread. Children die with the thread that started them: it outlives them."""
        try:
            self._group = ActorGroup(self._config, has_ingress=False)
            try:
                self._loop.run_until_complete(self._run())
            finally:
                self._group.stop()
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)
        finally:
            self._loop.close()

    async def _run(self) -> None:
        self._group.start()
        self._open_front()
        while not (self._group.is_ready and self._front.ready.is_set()):
            self._group.poll(0)
            await asyncio.sleep(POLL_S)
        self._started.set_result(None)
        watchdog = self._group.watchdog()
        try:
            while not self._stop.is_set():
                self._group.poll(0)
                watchdog.check()
                await self._wait_for_stop(WATCH_EVERY_S)
        except ActorDiedError as error:
            self._front.engine_died(str(error))
            await asyncio.to_thread(self._group.stop)
            await self._wait_for_stop(None)
        finally:
            await self._say_goodbye()

    async def _say_goodbye(self) -> None:
        """The loop goes on until all who wait for it have heard."""
        with self._lock:
            self._is_over = True
        self._front.fail_all(_shut_down())
        await asyncio.sleep(0)  # work that came just before becomes a task
        if waiting := asyncio.all_tasks() - {asyncio.current_task()}:
            _, late = await asyncio.wait(waiting, timeout=FAREWELL_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._front.close()
        self._inbox.close()

    async def _wait_for_stop(self, timeout_s: float | None) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), timeout_s)

    def _open_front(self) -> None:
        config, group = self._config, self._group
        model_path, tokenizer_path = self._group.paths["model"], self._group.paths["tokenizer"]
        model = ModelConfig.load(
            model_path, config.model_overrides, is_embedding=config.is_embedding
        )
        to_scheduler: Sender[IngressToScheduler] = Sender(group.open_writer("ingress->scheduler"))
        self._tokenizer = None if config.skip_tokenizer_init else Tokenizer.load(tokenizer_path)
        self._front = Front(
            TickSender(self._loop, to_scheduler),
            self._tokenizer,
            FrontOptions(
                context_len=config.context_length or model.context_len,
                vocab_size=model.vocab_size,
                max_live_requests=MAX_LIVE_REQUESTS,
                max_batch_requests=MAX_LIVE_REQUESTS,
                stream_interval=config.stream_interval,
                allow_auto_truncate=config.allow_auto_truncate,
                is_pooled=model.is_pooled,
                max_sessions=config.max_sessions,
                session_timeout=config.session_timeout,
                log_requests=config.log_requests,
                log_requests_level=config.log_requests_level,
            ),
        )
        self._weights = ServedWeights(config, model_path, self._front)
        self._inbox = Inbox(self._loop, lambda error: self._front.engine_died(repr(error)))
        reader = group.open_reader("detokenizer->ingress")
        self._inbox.add(Receiver(reader, DetokenizerToIngress), self._front.receive)

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run on the engine's loop."""
        if self._thread.is_alive():  # else it is over, or was left behind by a fork
            with self._lock:
                if not self._is_over:
                    return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise _shut_down()

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """As `_submit`, and wait; an interrupt ends it."""
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _answer(self, request: GenerateRequest) -> Any:
        async with await self._front.submit(request.call) as running:
            answers = await running.finished()
        _raise_failure(answers)
        return NativeReply(request, self._tokenizer).whole(answers)

    async def _encode(self, request: EncodeRequest) -> Any:
        async with await self._front.submit(request.call) as running:
            answers = await running.finished()
        _raise_failure(answers)
        return EncodeReply(request, is_plain=True).whole(answers)

    async def _feed(self, request: GenerateRequest, put: Callable[[Output | None], None]) -> None:
        """Hand every event of a stream to `put`, and None after the last, whatever happens."""
        try:
            reply = NativeReply(request, self._tokenizer, is_disjoint=self._config.stream_output)
            async with await self._front.submit(request.call) as running:
                async for answers in running.changes():
                    _raise_failure(answers)
                    for answer in answers:
                        for event in reply.progress(answer):
                            put(event)
        finally:
            put(None)

    def _iterate(self, request: GenerateRequest) -> Iterator[Output]:
        events: queue.SimpleQueue[Output | None] = queue.SimpleQueue()
        feed = self._submit(self._feed(request, events.put))
        try:
            while (event := events.get()) is not None:
                yield event
            feed.result()
        finally:
            feed.cancel()

    async def _iterate_async(self, request: GenerateRequest) -> AsyncIterator[Output]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Output | None] = asyncio.Queue()

        def put(event: Output | None) -> None:
            with suppress(RuntimeError):  # the reader's loop is over
                loop.call_soon_threadsafe(events.put_nowait, event)

        feed = self._submit(self._feed(request, put))
        try:
            while (event := await events.get()) is not None:
                yield event
            await asyncio.wrap_future(feed)
        finally:
            feed.cancel()


def _request(
    prompt: str | Sequence[str] | None,
    sampling_params: dict[str, Any] | Sequence[dict[str, Any]] | None,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    stream: bool,
    fields: dict[str, Any],
) -> GenerateRequest:
    named = {
        "text": prompt,
        "sampling_params": sampling_params,
        "input_ids": input_ids,
        "stream": stream,
    }
    return generate_request(named | fields)


def _shut_down() -> EngineError:
    return EngineError("the engine was shut down")


async def _call(work: Callable[[], T]) -> T:
    """For what must happen on the engine's loop."""
    return work()


def _raise_failure(answers: Sequence[Answer]) -> None:
    for answer in answers:
        if answer.failure is not None:
            raise answer.failure
