"""Every HTTP route: one table, and the handlers of the rows that are about the model.

StateRoutes, FileRoutes, EngineRoutes ── rows ──▶ Routes ──▶ the application, /openapi.json
"""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aiohttp import web

from sgl.actors.access import Access, Level
from sgl.actors.admin_routes import AdminRoutes
from sgl.actors.embedding_routes import EmbeddingRoutes
from sgl.actors.endpoint import GENERATION, Endpoint, Handler
from sgl.actors.engine_routes import EngineRoutes
from sgl.actors.file_routes import FileRoutes
from sgl.actors.front import Front
from sgl.actors.gate import Gate
from sgl.actors.http_answer import answer_call
from sgl.actors.http_body import read_body
from sgl.actors.middlewares import forbidden, json_response
from sgl.actors.openai_calls import OpenAiCalls, ServedModel
from sgl.actors.openapi import describe
from sgl.actors.parser_routes import ParserRoutes
from sgl.actors.session_routes import SessionRoutes
from sgl.actors.state_routes import StateRoutes
from sgl.config import ServerConfig
from sgl.errors import InvalidRequestError, ModelNotFoundError
from sgl.protocol.answers import (
    Aborted,
    ChatChunk,
    ChatCompletion,
    Completion,
    DetokenizedText,
    GeneratedText,
    ModelCard,
    ModelInfo,
    ModelList,
    NativeError,
    OpenAiError,
    ServerInfo,
    TokenizedText,
)
from sgl.protocol.body import convert, id_array, parse_fields
from sgl.protocol.native import GenerateBody, parse_generate
from sgl.protocol.native_reply import NativeReply
from sgl.protocol.openai import model_card, model_list
from sgl.protocol.openai_chat import ChatBody
from sgl.protocol.openai_completions import CompletionBody
from sgl.protocol.operation import AbortBody, DetokenizeBody, TokenizeBody


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
        state: StateRoutes,
        sessions: SessionRoutes,
        admin: AdminRoutes,
        gate: Gate,
        access: Access,
    ) -> None:
        self._config = config
        self._model = model
        self._front = front
        self._gate = gate
        self._access = access
        self._started = int(time.time())
        self._max_body_bytes = int(config.max_body_mb * 1e6)
        self._calls = calls
        self._state = state
        self._files = files
        self._embeddings = EmbeddingRoutes(config, front, calls, gate)
        self._engine = EngineRoutes(front)
        self._sessions = sessions
        self._admin = admin
        self.described = describe(self.table(), _version(), access.keys_of)

    def table(self) -> list[Endpoint]:
        return [
            *self._state.table(),
            *self._generation_routes(),
            *self._embeddings.table(),
            *self._model_routes(),
            *self._token_routes(),
            *self._files.table(),
            *ParserRoutes(self._config, self._calls.answers).table(),
            *self._sessions.table(),
            *self._admin.table(),
            *self._engine.table(),
            Endpoint(
                "GET",
                "/openapi.json",
                Level.PUBLIC,
                self.description,
                "This description",
                answer=dict[str, Any],
            ),
        ]

    def _generation_routes(self) -> list[Endpoint]:
        return [
            Endpoint(
                "POST PUT",
                "/generate",
                Level.API,
                self.generate,
                "Go on from one prompt or many",
                body=GenerateBody,
                example={"text": "The capital of France is", "sampling_params": {"temperature": 0}},
                answer=GeneratedText | list[GeneratedText],
                events=(GeneratedText, NativeError),
                errors=GENERATION,
            ),
            Endpoint(
                "POST",
                "/v1/completions",
                Level.API,
                self.completions,
                "Go on from one prompt or many",
                body=CompletionBody,
                example={"prompt": "The capital of France is", "max_tokens": 8},
                answer=Completion,
                events=(Completion, OpenAiError),
                errors=GENERATION,
            ),
            Endpoint(
                "POST",
                "/v1/chat/completions",
                Level.API,
                self.chat_completions,
                "Answer a chat",
                body=ChatBody,
                example={"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8},
                answer=ChatCompletion,
                events=(ChatChunk, OpenAiError),
                errors=GENERATION,
            ),
        ]

    def _model_routes(self) -> list[Endpoint]:
        rows: list[tuple[str, Handler, str, Any]] = [
            ("/v1/models", self.models, "The model, as a list of one", ModelList),
            ("/v1/models/{id:.+}", self.one_model, "The model, if it has this name", ModelCard),
            ("/get_model_info", self.model_info, "Where the model comes from", ModelInfo),
            ("/get_server_info", self.server_info, "Limits and settings", ServerInfo),
            ("/get_server_args", self.server_info, "The same as /get_server_info", ServerInfo),
        ]
        return [
            Endpoint("GET", path, Level.API, handler, summary, answer=answer)
            for path, handler, summary, answer in rows
        ]

    def _token_routes(self) -> list[Endpoint]:
        return [
            Endpoint(
                "POST",
                "/tokenize",
                Level.API,
                self.tokenize,
                "Text to token ids",
                body=TokenizeBody,
                example={"text": "The capital of France is"},
                answer=TokenizedText,
            ),
            Endpoint(
                "POST",
                "/detokenize",
                Level.API,
                self.detokenize,
                "Token ids to text",
                body=DetokenizeBody,
                answer=DetokenizedText,
            ),
            Endpoint(
                "POST",
                "/abort_request",
                Level.API,
                self.abort_request,
                "End a request, or all",
                body=AbortBody,
                example={"rid": "story"},
                answer=Aborted,
                errors=(403, 500, 503),
            ),
        ]

    async def description(self, request: web.Request) -> web.Response:
        return json_response(self.described)

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
                "model_path": self._admin.weights.path,
                "tokenizer_path": self._model.tokenizer_path,
                "is_generation": not self._front.is_pooled,
                "keeps_tokens": self._model.tokenizer is not None and not self._front.is_pooled,
                "chat_format": self._model.chat_format,
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
            info = self._config.public_values() | self._admin.settings() | info
        return json_response(info)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = convert(parse_fields(await self._body(request)), TokenizeBody)
        text = body.prompt if body.text is None else body.text
        if text is None:
            raise InvalidRequestError("text must be given", param="text")
        texts = [text] if isinstance(text, str) else text
        encode = self._model.need_tokenizer().encode

        def encode_all() -> list[list[int]]:
            return [encode(one, body.add_special_tokens).tolist() for one in texts]

        tokens = await asyncio.to_thread(encode_all)
        counts = [len(ids) for ids in tokens]
        is_one = isinstance(text, str)
        return json_response(
            {
                "tokens": tokens[0] if is_one else tokens,
                "count": counts[0] if is_one else counts,
                "max_model_len": self._model.context_len,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        body = convert(parse_fields(await self._body(request)), DetokenizeBody)
        ids = id_array(body.tokens, "tokens")
        if max(ids) >= self._front.vocab_size:
            raise InvalidRequestError(
                f"tokens holds the id {max(ids)}, the vocabulary has ids from 0 to "
                f"{self._front.vocab_size - 1}",
                param="tokens",
            )
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

    async def _body(self, request: web.Request) -> bytes:
        return await read_body(request, self._max_body_bytes)

    def _card(self, name: str) -> ModelCard:
        return model_card(name, self._started, self._model.context_len)


def _version() -> str:
    try:
        return version("sgl")
    except PackageNotFoundError:  # running from a checkout
        return "unknown"
