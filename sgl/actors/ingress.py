"""The ingress actor: HTTP in front of the engine.

    clients ◀── HTTP ──▶ Routes ──▶ Front ── Generate Embed … Control ──▶ scheduler
                           ▲         ▲
    supervisor ── Drain ───┘         └── NewText Reply EngineReady ── detokenizer

It listens from the start, so that probes get an answer while the model is loaded; it takes requests
once a warm-up generation has gone through the whole engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, assert_never

import uvloop
from aiohttp import web

from sgl.actors.access import Access
from sgl.actors.admin_routes import AdminRoutes
from sgl.actors.batch_share import BatchShare
from sgl.actors.batches import Batches
from sgl.actors.channel import Inbox, TickSender
from sgl.actors.chat_format import format_of, load_template
from sgl.actors.connections import ExpectMalformed, HeaderDeadline, StallWatch
from sgl.actors.endpoint import Handler, register
from sgl.actors.file_routes import FileRoutes
from sgl.actors.file_store import FileStore
from sgl.actors.front import Front, FrontOptions
from sgl.actors.gate import Gate, Phase
from sgl.actors.middlewares import (
    add_headers,
    check_access,
    errors_as_json,
    log_requests,
    name_request,
)
from sgl.actors.openai_calls import OpenAiCalls, ServedModel
from sgl.actors.routes import Routes
from sgl.actors.served_weights import ServedWeights
from sgl.actors.session_routes import SessionRoutes
from sgl.actors.state_routes import StateRoutes, generate_quietly
from sgl.config import ServerConfig
from sgl.errors import ConfigError, EngineError
from sgl.messages import DetokenizerToIngress, Drain, EngineDied, SupervisorToIngress
from sgl.metrics import Metrics, StatusPage

if TYPE_CHECKING:
    from sgl.actors.actor import Context

logger = logging.getLogger(__name__)

BACKLOG = 2048
HEADER_TIMEOUT_S = 10.0
KEEPALIVE_S = 75.0
FAREWELL_S = 2.0  # for handlers to write their last words
WARM_UP_TOKENS = 8


class Ingress:
    """The HTTP server of one engine, from listening to the end of draining.

    max_running   requests that the engine runs at a time
    """

    def __init__(
        self,
        config: ServerConfig,
        model: ServedModel,
        front: Front,
        page: StatusPage,
        beat: Callable[[], None] = lambda: None,
        max_running: int = 128,
    ) -> None:
        self._config = config
        self._front = front
        self._page = page
        self._beat = beat
        self._gate = Gate()
        self._stall = StallWatch(config.watchdog_timeout)
        self._deadline = HeaderDeadline(HEADER_TIMEOUT_S)
        self._is_ending = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_tokenizer = model.tokenizer is not None
        self._has_template = model.chat_template is not None
        access = Access(config.api_key, config.admin_api_key, config.host)
        calls = OpenAiCalls(config, model)
        self.tool_format = calls.answers.tools
        files = FileStore(config.file_folder, int(config.max_file_mb * 1e6))
        self._batches = Batches(
            files,
            front,
            calls,
            BatchShare.of(max_running=max_running, max_live=front.max_live),
            max_line_bytes=int(config.max_body_mb * 1e6),
        )
        metrics = Metrics(front.counts, page, config.model_name)
        self.routes = Routes(
            config,
            model,
            front,
            calls=calls,
            files=FileRoutes(files, self._batches, self._gate),
            state=StateRoutes(front, self._gate, metrics, self._stall),
            sessions=SessionRoutes(front, self._gate),
            admin=AdminRoutes(ServedWeights(config, model.path, front), front.request_log),
            gate=self._gate,
            access=access,
        )
        self.app = self._application(access)
        self._runner = web.AppRunner(
            self.app,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=KEEPALIVE_S,
            shutdown_timeout=FAREWELL_S,
        )

    async def serve(self, listener: socket.socket) -> None:
        """Answer on `listener` until the server has been drained."""
        await self._runner.setup()
        await web.SockSite(self._runner, listener, backlog=BACKLOG).start()
        watch = asyncio.create_task(self._watch())
        warm_up = asyncio.create_task(self._warm_up(listener))
        ending = asyncio.create_task(self._is_ending.wait())
        try:
            await asyncio.wait((warm_up, ending), return_when=asyncio.FIRST_COMPLETED)
            if warm_up.done():
                warm_up.result()
            await ending
        finally:
            for task in (watch, warm_up, ending):
                task.cancel()
            await self._batches.stop()
            await self._runner.cleanup()
            self._front.close()

    def receive(self, messages: Iterable[SupervisorToIngress]) -> None:
        """Do what the supervisor asks for."""
        for message in messages:
            match message:
                case Drain():
                    self._spawn_drain(message.timeout_s, message.delay_s)
                case EngineDied():
                    self._front.engine_died(message.message)
                    self._spawn_drain(FAREWELL_S)
                case _:
                    assert_never(message)

    async def drain(self, timeout_s: float, delay_s: float) -> None:
        """Say goodbye: not ready, then nothing new, then whatever still runs is ended."""
        self._gate.phase = Phase.LEAVING
        self._batches.pause()
        await asyncio.sleep(delay_s)
        self._gate.phase = Phase.CLOSED
        if not await self._front.wait_idle(timeout_s):
            logger.warning("Abort of %d requests: the time to finish is up", self._front.num_live)
            await self._batches.stop()
            self._front.fail_all(EngineError("server_shutdown: the server was stopped"))
        self._is_ending.set()

    def _spawn_drain(self, timeout_s: float, delay_s: float = 0.0) -> None:
        task = asyncio.create_task(self.drain(timeout_s, delay_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _application(self, access: Access) -> web.Application:
        app = web.Application(client_max_size=int(self._config.max_body_mb * 1e6))
        levels = register(app, self.routes.table())
        app.middlewares.append(name_request)
        app.middlewares.append(self._mark_served)
        app.middlewares.append(log_requests(self._front.request_log))
        app.middlewares.append(check_access(access, levels))
        app.middlewares.append(errors_as_json)
        app.on_response_prepare.append(add_headers)
        return app

    async def _warm_up(self, listener: socket.socket) -> None:
        await self._front.ready.wait()
        prompt: str | list[int] = "The capital city of France is" if self._has_tokenizer else [0]
        await generate_quietly(self._front, prompt, WARM_UP_TOKENS)
        if self._gate.phase is Phase.LOADING:
            self._gate.phase = Phase.OPEN
            logger.info("The server is fired up and ready to roll!\n%s", self._greeting(listener))
            await self._batches.resume()

    def _greeting(self, listener: socket.socket) -> str:
        url = f"http://{_reachable(self._config.host)}:{listener.getsockname()[1]}"
        key = ' -H "Authorization: Bearer $API_KEY"' if self._config.api_key else ""
        path, body = self._example()
        return (
            f"\n  It listens on {url}. Try it:\n\n"
            f'  curl {url}{path} -H "Content-Type: application/json"{key} \\\n'
            f"    -d '{body}'\n"
        )

    def _example(self) -> tuple[str, str]:
        """A path and a body that show that the model works, in any dtype and not for ever.

        Without its second sentence the demo model is torn between English and French: in bfloat16
        two first tokens are equally likely.
        """
        if self._front.is_pooled:
            prompt = '"What is the capital of France?"' if self._has_tokenizer else "[0]"
            return "/v1/embeddings", f'{{"input": {prompt}}}'
        if self._has_template:
            question = "What is the capital of France? Answer in one sentence."
            messages = f'[{{"role": "user", "content": "{question}"}}]'
            body = f'{{"messages": {messages}, "temperature": 0, "max_tokens": 64}}'
            return "/v1/chat/completions", body
        prompt = '"text": "The capital of France is"' if self._has_tokenizer else '"input_ids": [0]'
        sampling = '{"temperature": 0, "max_new_tokens": 16}'
        return "/generate", f'{{{prompt}, "sampling_params": {sampling}}}'

    @web.middleware
    async def _mark_served(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._deadline.mark_served(request.protocol)
        return await handler(request)

    async def _watch(self) -> None:
        """Once a second: connections and sessions that nobody uses, an engine that hangs."""
        loop = asyncio.get_running_loop()
        while True:
            self._beat()
            await asyncio.sleep(1.0)
            now = loop.time()
            self._stall.look(self._page.read(), now)
            self._front.sessions.sweep()
            if self._runner.server is not None:
                self._deadline.sweep(self._runner.server.connections, now)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError if the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}. Choose another "
            "--port or --host, or stop the program that has it"
        ) from None
    return listener


def run(context: Context) -> None:
    """The process."""
    logging.getLogger("aiohttp.server").addFilter(ExpectMalformed())
    uvloop.run(_run(context))


async def _run(context: Context) -> None:
    config, loop = context.config, asyncio.get_running_loop()
    tokenizer = context.load_tokenizer()
    template = load_template(config.chat_template, tokenizer)
    model = ServedModel(
        path=context.bootstrap.paths["model"],
        tokenizer_path=context.bootstrap.paths["tokenizer"],
        context_len=context.context_len,
        tokenizer=tokenizer,
        chat_template=template,
        chat_format=format_of(template, tokenizer),
        vector_sizes=context.model_config.vector_sizes,
    )
    front = Front(
        TickSender(loop, context.sender("ingress->scheduler")),
        tokenizer,
        FrontOptions(
            context_len=context.context_len,
            vocab_size=context.model_config.vocab_size,
            max_live_requests=config.max_queue_requests + context.limits.max_running_requests,
            max_batch_requests=config.max_batch_requests,
            stream_interval=config.stream_interval,
            allow_auto_truncate=config.allow_auto_truncate,
            is_pooled=context.model_config.is_pooled,
            max_sessions=config.max_sessions,
            session_timeout=config.session_timeout,
            log_requests=config.log_requests,
            log_requests_level=config.log_requests_level,
        ),
    )
    ingress = Ingress(
        config,
        model,
        front,
        context.status,
        partial(context.status.beat, "ingress"),
        context.limits.max_running_requests,
    )
    inbox = Inbox(loop, _end_process)
    inbox.add(context.receiver("detokenizer->ingress", DetokenizerToIngress), front.receive)
    inbox.add(context.receiver("supervisor->ingress", SupervisorToIngress), ingress.receive)
    listener = listen(config.host, config.port)
    form = ingress.tool_format
    calls = f", tool calls as {form.name} has them" if form else ""
    context.ready(f"listening on {config.host}, port {config.port}{calls}")
    await ingress.serve(listener)
    inbox.close()


def _end_process(error: Exception) -> None:
    """Messages are lost: end, so that the supervisor ends the rest and no client waits for ever."""
    logger.critical("The ingress failed", exc_info=error)
    os._exit(1)


def _reachable(host: str) -> str:
    """An address that a client on this machine can use."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
