"""The ingress over a real socket, in front of a fake engine, in the loop of the test."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai
import orjson
from fakes import FakeEngine, LetterTokenizer, connected_front

from sgl.actors.front import Front
from sgl.actors.ingress import Ingress, listen
from sgl.actors.openai_calls import ServedModel
from sgl.actors.status_page import SchedulerStatus
from sgl.config import ServerConfig
from sgl.messages import Drain
from sgl.protocol.chat_template import ChatTemplate

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
CONTEXT_LEN = 4096


class FakePage:
    """A status page that tests write."""

    def __init__(self) -> None:
        self.status = SchedulerStatus(num_running_reqs=3, max_total_tokens=4096, token_usage=0.5)

    def read(self) -> SchedulerStatus:
        return self.status


@dataclass
class Server:
    url: str
    engine: FakeEngine
    front: Front
    ingress: Ingress
    http: aiohttp.ClientSession
    task: asyncio.Task[None]

    async def post(self, path: str, body: Any, **named: Any) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body, **named) as response:
            text = await response.text()
            return response.status, orjson.loads(text) if text[:1] in "{[" and text else text

    async def get(self, path: str, **named: Any) -> int:
        async with self.http.get(self.url + path, **named) as response:
            await response.read()
            return response.status

    async def generate(self, text: Any = "a", **sampling: Any) -> Any:
        status, answer = await self.post("/generate", {"text": text, "sampling_params": sampling})
        assert status == 200, answer
        return answer

    async def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream, which must end with [DONE]."""
        async with self.http.post(self.url + path, json=body | {"stream": True}) as response:
            assert response.status == 200
            assert response.headers["Content-Type"].startswith("text/event-stream")
            assert response.headers["X-Accel-Buffering"] == "no"
            text = (await response.read()).decode()
        pieces = text.removesuffix("\n\n").split("\n\n")
        assert all(piece.startswith("data: ") for piece in pieces)
        assert pieces[-1] == "data: [DONE]"
        return [orjson.loads(piece.removeprefix("data: ")) for piece in pieces[:-1]]

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)


@asynccontextmanager
async def server(
    *,
    step_s: float = 0.0,
    is_open: bool = True,
    max_messages: int | None = None,
    vector_sizes: Sequence[int] = (),
    template: str = TEMPLATE,
    **flags: Any,
) -> AsyncIterator[Server]:
    """`vector_sizes`: the model gives vectors, and they can be so long."""
    engine = FakeEngine(step_s=step_s, max_messages=max_messages)
    config = ServerConfig(model_path="letters", **flags)
    model = ServedModel(
        path="letters",
        tokenizer_path="letters",
        context_len=CONTEXT_LEN,
        tokenizer=LetterTokenizer(),
        chat_template=ChatTemplate(template),
        vector_sizes=vector_sizes,
    )
    async with (
        connected_front(
            engine,
            is_open=is_open,
            context_len=CONTEXT_LEN,
            is_pooled=bool(vector_sizes),
            max_sessions=config.max_sessions,
            session_timeout=config.session_timeout,
            log_requests=config.log_requests,
            log_requests_level=config.log_requests_level,
        ) as front,
        aiohttp.ClientSession() as http,
    ):
        ingress = Ingress(config, model, front, FakePage())
        listener = listen("127.0.0.1", 0)
        task = asyncio.create_task(ingress.serve(listener))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        made = Server(url, engine, front, ingress, http, task)
        if is_open:
            await is_ready(made)
        try:
            yield made
        finally:
            ingress.receive([Drain(0.0, 0.0)])
            await task


@contextmanager
def in_thread(**flags: Any) -> Iterator[Server]:
    """A server on a thread of its own, for clients that block."""
    made: queue.Queue[tuple[Server, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        stop = asyncio.Event()
        async with server(**flags) as s:
            made.put((s, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    running, loop, stop = made.get(timeout=10)
    try:
        yield running
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def is_ready(server: Server) -> None:
    async with asyncio.timeout(5):
        while await server.get("/health/ready") != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
