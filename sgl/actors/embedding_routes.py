"""The routes that answer with vectors: one table, and a short handler for each row."""

from __future__ import annotations

from aiohttp import web

from sgl.actors.access import Level
from sgl.actors.endpoint import GENERATION, Endpoint
from sgl.actors.front import Front
from sgl.actors.gate import Gate
from sgl.actors.http_answer import whole_answer
from sgl.actors.http_body import read_body
from sgl.actors.middlewares import json_response
from sgl.actors.openai_calls import OpenAiCalls
from sgl.config import ServerConfig
from sgl.protocol.answers import Embeddings, EncodedText
from sgl.protocol.call import GenerationCall, WholeReply
from sgl.protocol.encode import EncodeBody, EncodeReply, parse_encode
from sgl.protocol.openai_embeddings import EmbeddingsBody


class EmbeddingRoutes:
    """The handlers, and which is where and for whom."""

    def __init__(self, config: ServerConfig, front: Front, calls: OpenAiCalls, gate: Gate) -> None:
        self._max_body_bytes = int(config.max_body_mb * 1e6)
        self._max_prompts = config.max_batch_requests
        self._front = front
        self._calls = calls
        self._gate = gate

    def table(self) -> list[Endpoint]:
        encode = [
            Endpoint(
                "POST PUT",
                path,
                Level.API,
                self.encode,
                summary,
                body=EncodeBody,
                example={"text": "The capital of France is Paris."},
                answer=EncodedText | list[EncodedText],
                errors=GENERATION,
            )
            for path, summary in (
                ("/encode", "A vector of one text or of many"),
                ("/classify", "The same as /encode; of a classifier, scores"),
            )
        ]
        return [
            *encode,
            Endpoint(
                "POST",
                "/v1/embeddings",
                Level.API,
                self.embeddings,
                "A vector of one text or of many",
                body=EmbeddingsBody,
                example={"input": "The capital of France is Paris."},
                answer=Embeddings,
                errors=(*GENERATION, 499),
            ),
        ]

    async def encode(self, request: web.Request) -> web.Response:
        self._gate.check()
        parsed = parse_encode(await self._body(request), self._max_prompts)
        return await self._answer(parsed.call, EncodeReply(parsed))

    async def embeddings(self, request: web.Request) -> web.Response:
        self._gate.check()
        return await self._answer(*self._calls.embeddings(await self._body(request)))

    async def _answer(self, call: GenerationCall, reply: WholeReply) -> web.Response:
        """If the client leaves, this is cancelled, and with it the call."""
        async with await self._front.submit(call) as running:
            return json_response(await whole_answer(running, reply))

    async def _body(self, request: web.Request) -> bytes:
        return await read_body(request, self._max_body_bytes)
