"""Every HTTP route: one table, and a short handler for each row."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from aiohttp import web

from sgl.actors.access import Access, Level
from sgl.actors.connections import StallWatch
from sgl.actors.file_routes import FileRoutes, Route
from sgl.actors.front import Front
from sgl.actors.gate import Gate
from sgl.actors.http_answer import answer_call
from sgl.actors.http_body import read_body
from sgl.actors.middlewares import forbidden, json_response
from sgl.actors.openai_calls import OpenAiCalls, ServedModel
from sgl.config import ServerConfig
from sgl.errors import InvalidRequestError, ModelNotFoundError, RequestError
from sgl.messages import Reply
from sgl.metrics import CONTENT_TYPE, Metrics
from sgl.protocol.body import convert, id_array, parse_fields
from sgl.protocol.call import GenerationCall, PromptCall
from sgl.protocol.native import parse_generate
from sgl.protocol.native_reply import NativeReply
from sgl.protocol.openai import model_card, model_list
from sgl.protocol.profile import ProfileRequest
from sgl.sampling_params import SamplingParams

PROBE_TIMEOUT_S = 20.0


class TokenizeBody(msgspec.Struct, kw_only=True):
    text: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True


class DetokenizeBody(msgspec.Struct, kw_only=True):
    tokens: list[int]
    skip_special_tokens: bool = False


class AbortBody(msgspec.Struct, kw_only=True):
    rid: str | None = None
    abort_all: bool = False


class Routes:
    """The handlers, and the table that says which is where and for whom."""

    def __init__(
        self,
        config: ServerConfig,
        model: ServedModel,
        front: Front,
        *,
        calls: OpenAiCalls,
        files: FileRoutes,
        gate: Gate,
        access: Access,
        metrics: Metrics,
        stall: StallWatch,
    ) -> None:
        self._config = config
        self._model = model
        self._front = front
        self._gate = gate
        self._access = access
        self._metrics = metrics
        self._stall = stall
        self._started = int(time.time())
        self._max_body_bytes = int(config.max_body_mb * 1e6)
        self._calls = calls
        self._files = files

    def add_to(self, app: web.Application) -> dict[web.AbstractResource, Level]:
        """Register all of them; says the level of each, for the check of access."""
        levels: dict[web.AbstractResource, Level] = {}
        for methods, path, level, handler in self._table():
            resource = app.router.add_resource(path)
            levels[resource] = level
            for method in methods.split():
                resource.add_route(method, handler)
        return levels

    def _table(self) -> list[Route]:
        return [
            ("GET", "/health", Level.PUBLIC, self.ready),
            ("GET", "/health/ready", Level.PUBLIC, self.ready),
            ("GET", "/health/live", Level.PUBLIC, self.live),
            ("GET", "/health_generate", Level.PUBLIC, self.health_generate),
            ("GET", "/metrics", Level.PUBLIC, self.metrics),
            ("POST PUT", "/generate", Level.API, self.generate),
            ("POST", "/v1/completions", Level.API, self.completions),
            ("POST", "/v1/chat/completions", Level.API, self.chat_completions),
            ("GET", "/v1/models", Level.API, self.models),
            ("GET", "/v1/models/{id:.+}", Level.API, self.one_model),
            ("GET", "/get_model_info", Level.API, self.model_info),
            ("GET", "/get_server_info", Level.API, self.server_info),
            ("GET", "/get_server_args", Level.API, self.server_info),
            ("POST", "/tokenize", Level.API, self.tokenize),
            ("POST", "/detokenize", Level.API, self.detokenize),
            ("POST", "/abort_request", Level.API, self.abort_request),
            *self._files.table(),
            ("GET POST", "/flush_cache", Level.ADMIN, self.flush_cache),
            ("GET POST", "/start_profile", Level.ADMIN, self.start_profile),
            ("GET POST", "/stop_profile", Level.ADMIN, self.stop_profile),
        ]

    async def ready(self, request: web.Request) -> web.Response:
        is_ready = self._gate.is_ready and not self._front.is_dead and not self._stall.is_stalled
        return web.Response(status=200 if is_ready else 503)

    async def live(self, request: web.Request) -> web.Response:
        is_live = not self._front.is_dead and not self._stall.is_stalled
        return web.Response(status=200 if is_live else 503)

    async def health_generate(self, request: web.Request) -> web.Response:
        """200 if the engine makes a token within a few seconds."""
        try:
            self._gate.check()
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await generate_quietly(self._front, [0], num_tokens=1)
        except (RequestError, TimeoutError):
            return web.Response(status=503)
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self._gate.check()
        parsed = parse_generate(await self._body(request), self._config.max_batch_requests)
        reply = NativeReply(parsed, self._model.tokenizer, is_disjoint=self._config.stream_output)
        return await answer_call(request, self._front, parsed.call, reply)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self._gate.check()
        call, reply = self._calls.completion(await self._body(request))
        return await answer_call(request, self._front, call, reply)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        self._gate.check()
        call, reply = self._calls.chat(await self._body(request))
        return await answer_call(request, self._front, call, reply)

    async def models(self, request: web.Request) -> web.Response:
        return json_response(model_list([self._card(self._config.model_name)]))

    async def one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if name not in (self._config.model_name, "default"):
            raise ModelNotFoundError(
                f"there is no model {name!r:.200}: this server has {self._config.model_name!r}",
                param="model",
            )
        return json_response(self._card(self._config.model_name))

    async def model_info(self, request: web.Request) -> web.Response:
        return json_response(
            {
                "model_path": self._model.path,
                "tokenizer_path": self._model.tokenizer_path,
                "is_generation": True,
            }
        )

    async def server_info(self, request: web.Request) -> web.Response:
        """The limits for everybody; the settings, without keys, for administrators."""
        limits = self._front.limits
        info: dict[str, Any] = {
            "version": _version(),
            "max_total_num_tokens": self._front.max_total_tokens,
            "max_req_input_len": limits and limits.max_prompt_len,
        }
        if self._access.allows(request, Level.ADMIN):
            info = self._config.public_values() | info
        return json_response(info)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = convert(parse_fields(await self._body(request)), TokenizeBody)
        text = body.prompt if body.text is None else body.text
        if text is None:
            raise InvalidRequestError("text must be given", param="text")
        ids = await asyncio.to_thread(
            self._model.need_tokenizer().encode, text, body.add_special_tokens
        )
        return json_response(
            {
                "tokens": ids.tolist(),
                "count": len(ids),
                "max_model_len": self._model.context_len,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        body = convert(parse_fields(await self._body(request)), DetokenizeBody)
        ids = id_array(body.tokens, "tokens")
        if min(ids) < 0:
            raise InvalidRequestError(f"tokens holds the id {min(ids)}", param="tokens")
        decode = self._model.need_tokenizer().decode
        return json_response(
            {"text": await asyncio.to_thread(decode, ids, body.skip_special_tokens)}
        )

    async def abort_request(self, request: web.Request) -> web.Response:
        body = convert(parse_fields(await self._body(request)), AbortBody)
        if body.abort_all:
            if not self._access.allows(request, Level.ADMIN):
                return forbidden(request)
            num_aborted = self._front.abort_all()
            await self._front.control("abort_all")
            return json_response({"success": True, "num_aborted": num_aborted})
        if body.rid is None:
            raise InvalidRequestError("give a rid, or abort_all: true", param="rid")
        return json_response({"success": self._front.abort(body.rid)})

    async def flush_cache(self, request: web.Request) -> web.Response:
        return _told(await self._front.control("flush_cache"))

    async def start_profile(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        wanted = convert(parse_fields(body) if body else {}, ProfileRequest)
        return _told(await self._front.start_profile(wanted))

    async def stop_profile(self, request: web.Request) -> web.Response:
        return _told(await self._front.stop_profile())

    async def _body(self, request: web.Request) -> bytes:
        return await read_body(request, self._max_body_bytes)

    def _card(self, name: str) -> dict[str, Any]:
        return model_card(name, self._started, self._model.context_len)


async def generate_quietly(front: Front, prompt: str | list[int], num_tokens: int) -> None:
    """A generation of the server's own, whose answer nobody reads; raises RequestError."""
    call = PromptCall(
        prompt=prompt if isinstance(prompt, str) else id_array(prompt, "prompt"),
        sampling=SamplingParams(max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True),
    )
    async with await front.submit(GenerationCall(prompts=(call,))) as running:
        [answer] = await running.finished()
    if answer.failure is not None:
        raise answer.failure


def _told(reply: Reply) -> web.Response:
    """What the engine answered, as text; raises InvalidRequestError where it refused."""
    if not reply.ok:
        raise InvalidRequestError(reply.text)
    return web.Response(text=f"{reply.text}\n")


def _version() -> str:
    try:
        return version("sgl")
    except PackageNotFoundError:  # running from a checkout
        return "unknown"
