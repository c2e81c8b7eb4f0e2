"""Servers that speak the protocols of OpenAI, Anthropic and Vertex AI, and note what they get.

What a model says is a function of the request; stop texts and limits are followed, a word is a
token.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from PIL import Image

Body = dict[str, Any]


def words(text: str) -> list[str]:
    """Tokens: words with the space before them, and marks."""
    return re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)


def all_text(value: Any) -> str:
    """Every text in a request's messages, in order."""
    if isinstance(value, str):
        return value + " "
    if isinstance(value, dict):
        names = ("content", "text", "parts")
        return "".join(all_text(value[name]) for name in names if name in value)
    return "".join(map(all_text, value or ()))


def colours_seen(body: Body) -> str:
    """The answer of a model that sees: what is in the middle of each picture, red or blue."""
    parts = [part for message in body["messages"] for part in message["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return " and ".join(map(_middle_of, urls))


def _middle_of(data_url: str) -> str:
    data = base64.b64decode(data_url.removeprefix("data:image/png;base64,"))
    picture = Image.open(io.BytesIO(data))
    pixel = picture.getpixel((picture.width // 2, picture.height // 2))
    return {(255, 0, 0): "red", (0, 0, 255): "blue"}[pixel]


class FakeApi:
    """
    say       what the model would go on with, without end
    requests  path and body of each, in order
    fail_with statuses that the next requests are answered with
    """

    def __init__(self, say: Callable[[Body], str]) -> None:
        self.say = say
        self.requests: list[tuple[str, Body]] = []
        self.fail_with: list[int] = []
        self.url = ""

    @property
    def bodies(self) -> list[Body]:
        return [body for _, body in self.requests]

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_post("/{version}/{path:.*}:generateContent", self._generate_content)
        app.router.add_post("/{version}/{path:.*}:streamGenerateContent", self._stream_content)
        return app

    async def _body(self, request: web.Request) -> Body:
        body: Body = await request.json()
        self.requests.append((request.path, body))
        if self.fail_with:
            status = self.fail_with.pop(0)
            error = {"error": {"message": "as told", "type": "test", "code": status}}
            raise _failure(status, error)
        return body

    def _said(self, body: Body, stops: Any, limit: int | None) -> tuple[str, str]:
        """The text and why it ended."""
        text = self.say(body)
        stops = [stops] if isinstance(stops, str) else stops or []
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        cut = text[: min(places)] if places else text
        pieces = words(cut)
        if limit is not None and len(pieces) > limit:
            return "".join(pieces[:limit]), "length"
        return cut, "stop"

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        text, reason = self._said(body, body.get("stop"), limit)
        usage = _usage(all_text(body["messages"]), text)
        head = {"id": "chatcmpl-1", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": reason,
                "logprobs": None,
            }
            return web.json_response(
                head | {"object": "chat.completion", "choices": [choice], "usage": usage}
            )
        head["object"] = "chat.completion.chunk"

        async def events() -> AsyncIterator[Body]:
            for piece in words(text):
                yield head | {"choices": [{"index": 0, "delta": {"content": piece}}]}
            last = {"index": 0, "delta": {}, "finish_reason": reason}
            yield head | {"choices": [last]}
            yield head | {"choices": [], "usage": usage}

        return await _send(request, events())

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        if bias := body.get("logit_bias"):
            text, reason = self._biased(body, bias), "length"
        else:
            text, reason = self._said(body, body.get("stop"), body.get("max_tokens"))
        usage = _usage(body["prompt"], text)
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
            return web.json_response(head | {"choices": [choice], "usage": usage})

        async def events() -> AsyncIterator[Body]:
            for piece in words(text):
                yield head | {"choices": [{"index": 0, "text": piece, "finish_reason": None}]}
            yield head | {"choices": [{"index": 0, "text": "", "finish_reason": reason}]}
            yield head | {"choices": [], "usage": usage}

        return await _send(request, events())

    def _biased(self, body: Body, bias: dict[str, int]) -> str:
        """The first characters that may come and that the model would say, else the first."""
        wanted = self.say(body)
        allowed = [chr(int(token)) for token in bias]
        end = 0
        while end < min(len(wanted), body["max_tokens"]) and wanted[end] in allowed:
            end += 1
        said = wanted[:end] or allowed[0]
        for stop in body.get("stop") or ():
            said = said.partition(stop)[0]
        return said

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        stops = body.get("stop_sequences")
        if stops and not all(stop.strip() for stop in stops):
            return web.json_response(
                {
                    "type": "error",
                    "error": {
                        "type": "invalid_request_error",
                        "message": "stop_sequences: each must contain non-whitespace",
                    },
                },
                status=400,
            )
        text, reason = self._said(body, stops, body["max_tokens"])
        prompt = body.get("system", "") + " " + all_text(body["messages"])
        counts = _usage(prompt, text)
        usage = {
            "input_tokens": counts["prompt_tokens"],
            "output_tokens": counts["completion_tokens"],
        }
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": {"stop": "end_turn", "length": "max_tokens"}[reason],
            "stop_sequence": None,
            "usage": usage,
        }
        if not body.get("stream"):
            return web.json_response(message)

        async def events() -> AsyncIterator[Body]:
            yield {
                "type": "message_start",
                "message": message | {"content": [], "stop_reason": None},
            }
            yield {
                "type": "content_block_start",
                "index": 0,
                "content_block": {"type": "text", "text": ""},
            }
            for piece in words(text):
                delta = {"type": "text_delta", "text": piece}
                yield {"type": "content_block_delta", "index": 0, "delta": delta}
            yield {"type": "content_block_stop", "index": 0}
            delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
            yield {"type": "message_delta", "delta": delta, "usage": usage}
            yield {"type": "message_stop"}

        return await _send(request, events(), is_named=True)

    def _content(self, body: Body) -> tuple[str, str, Body]:
        config = body.get("generationConfig", {})
        text, reason = self._said(body, config.get("stopSequences"), config.get("maxOutputTokens"))
        prompt = all_text(body.get("systemInstruction", "")) + all_text(body["contents"])
        counts = _usage(prompt, text)
        usage = {
            "promptTokenCount": counts["prompt_tokens"],
            "candidatesTokenCount": counts["completion_tokens"],
            "totalTokenCount": counts["total_tokens"],
        }
        return text, {"stop": "STOP", "length": "MAX_TOKENS"}[reason], usage

    async def _generate_content(self, request: web.Request) -> web.StreamResponse:
        text, reason, usage = self._content(await self._body(request))
        content = {"role": "model", "parts": [{"text": text}]}
        candidate = {"content": content, "finishReason": reason}
        return web.json_response({"candidates": [candidate], "usageMetadata": usage})

    async def _stream_content(self, request: web.Request) -> web.StreamResponse:
        text, reason, usage = self._content(await self._body(request))

        async def events() -> AsyncIterator[Body]:
            for piece in words(text):
                content = {"role": "model", "parts": [{"text": piece}]}
                yield {"candidates": [{"content": content}]}
            last = {"content": {"role": "model", "parts": [{"text": ""}]}, "finishReason": reason}
            yield {"candidates": [last], "usageMetadata": usage}

        return await _send(request, events(), is_ended=False)


def _failure(status: int, error: Body) -> web.HTTPException:
    kinds: dict[int, type[web.HTTPException]] = {
        400: web.HTTPBadRequest,
        401: web.HTTPUnauthorized,
        429: web.HTTPTooManyRequests,
        500: web.HTTPInternalServerError,
    }
    return kinds[status](text=json.dumps(error), content_type="application/json")


def _usage(prompt: str, text: str) -> dict[str, int]:
    num_in, num_out = len(words(prompt)), len(words(text))
    return {"prompt_tokens": num_in, "completion_tokens": num_out, "total_tokens": num_in + num_out}


async def _send(
    request: web.Request,
    events: AsyncIterator[Body],
    *,
    is_named: bool = False,
    is_ended: bool = True,
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    async for event in events:
        name = f"event: {event['type']}\n" if is_named else ""
        await response.write(f"{name}data: {json.dumps(event)}\n\n".encode())
        await asyncio.sleep(0.002)  # so that each is a piece of its own
    if is_ended and not is_named:
        await response.write(b"data: [DONE]\n\n")
    return response


@contextmanager
def running(api: FakeApi) -> Iterator[FakeApi]:
    """On a thread of its own, until the block ends."""
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def live() -> None:
        runner = web.AppRunner(api.app(), shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield api
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
