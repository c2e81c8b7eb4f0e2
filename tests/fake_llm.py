"""An LLM server without a model: it answers with scripted bytes, in pieces cut as a test wants."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

NUM_PROMPT = 7  # what it says of every prompt


@dataclass
class Script:
    """How one request is answered: with the pieces, then properly or by hanging up."""

    pieces: list[bytes]
    status: int = 200
    kind: str = "text/event-stream"
    hangs_up: bool = False
    delay_s: float = 0.0


@dataclass
class FakeLlm:
    """`answer` makes the script of a request from its path and body."""

    answer: Callable[[str, dict[str, Any]], Script]
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    not_ready: int = 0
    flushes: list[int] = field(default_factory=list)
    running: int = 0
    peak: int = 0
    url: str = ""

    async def post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append((request.path, body))
        self.headers.append(dict(request.headers))
        script = self.answer(request.path, body)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(script.delay_s)
            response = web.StreamResponse(status=script.status)
            response.content_type = script.kind
            await response.prepare(request)
            for piece in script.pieces:
                await response.write(piece)
                await asyncio.sleep(0.001)
            if script.hangs_up:
                request.transport.abort()
            else:
                await response.write_eof()
            return response
        finally:
            self.running -= 1

    async def health(self, request: web.Request) -> web.Response:
        self.not_ready -= 1
        return web.Response(status=503 if self.not_ready >= 0 else 200)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake-model"}]})

    async def model_info(self, request: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def flush(self, request: web.Request) -> web.Response:
        return web.Response(status=self.flushes.pop(0) if self.flushes else 404)

    async def serve(self, ready: Callable[[], None], stop: asyncio.Event) -> None:
        app = web.Application()
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self.post)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/get_model_info", self.model_info)
        app.router.add_post("/flush_cache", self.flush)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready()
        await stop.wait()
        await runner.cleanup()


@contextmanager
def running(fake: FakeLlm) -> Iterator[FakeLlm]:
    """`fake` on a thread of its own, so that a whole command can run against it."""
    is_ready = threading.Event()
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        loops.append((asyncio.get_running_loop(), stop))
        await fake.serve(is_ready.set, stop)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert is_ready.wait(5)
    try:
        yield fake
    finally:
        loop, stop = loops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def sse(*payloads: Any, end: bytes = b"data: [DONE]\n\n") -> bytes:
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in payloads) + end


def native_event(num: int, text: str, *, is_last: bool = False, **meta: Any) -> dict[str, Any]:
    finish = {"type": "length", "length": num} if is_last else None
    counts = {"prompt_tokens": NUM_PROMPT, "completion_tokens": num, "cached_tokens": 3}
    return {"text": text, "meta_info": {"finish_reason": finish, **counts, **meta}}


def chat_event(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def text_event(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": None}


def usage_event(num_output: int) -> dict[str, Any]:
    counts = {"prompt_tokens": NUM_PROMPT, "completion_tokens": num_output}
    return {"choices": [], "usage": counts}


def well_behaved(path: str, body: dict[str, Any]) -> Script:
    """As many tokens as were asked for, "a" each."""
    sampling = body.get("sampling_params", body)
    num = next(sampling[name] for name in LENGTHS if name in sampling)
    if path == "/generate":
        events = [native_event(i, "a" * i, is_last=i == num) for i in range(1, num + 1)]
        whole = events[-1]
    else:
        make = chat_event if "chat" in path else text_event
        finishes = [None] * (num - 1) + ["length"]
        events = [*(make("a", finish) for finish in finishes), usage_event(num)]
        choice = {"text": "a" * num, "message": {"content": "a" * num}, "finish_reason": "length"}
        whole = {"choices": [choice], "usage": usage_event(num)["usage"]}
    if not body["stream"]:
        return Script([json.dumps(whole).encode()], kind="application/json")
    return Script([sse(event, end=b"") for event in events] + [sse()])


LENGTHS = ("max_new_tokens", "max_tokens", "max_completion_tokens")
