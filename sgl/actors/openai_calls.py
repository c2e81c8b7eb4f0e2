"""Bodies of the `/v1` endpoints with prompts: what they call for, and how the answers are told.

Used by the routes, and by batches for each of their lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from sgl.actors.answer_formats import answer_format
from sgl.actors.prompt_encoder import TextTokenizer
from sgl.config import ServerConfig
from sgl.errors import InvalidRequestError
from sgl.protocol.answers import ChatFormat
from sgl.protocol.call import GenerationCall, Reply, WholeReply
from sgl.protocol.openai import Server
from sgl.protocol.openai_chat import Template, parse_chat
from sgl.protocol.openai_chat_reply import ChatReply
from sgl.protocol.openai_completions import parse_completion
from sgl.protocol.openai_completions_reply import CompletionReply
from sgl.protocol.openai_embeddings import EmbeddingsReply, parse_embeddings

CallParser: TypeAlias = "Callable[[bytes], tuple[GenerationCall, WholeReply]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What the routes know of the model.

    tokenizer      None where only ids are served
    chat_format    how the template writes roles; None where it has no fixed way
    vector_sizes   lengths that its vectors can be given, its own last; none if it generates
    """

    path: str
    tokenizer_path: str
    context_len: int
    tokenizer: TextTokenizer | None
    chat_template: Template | None
    chat_format: ChatFormat | None = None
    vector_sizes: Sequence[int] = ()

    def need_tokenizer(self) -> TextTokenizer:
        """Raises InvalidRequestError where there is none."""
        if self.tokenizer is None:
            raise InvalidRequestError(
                "this server runs without a tokenizer (--skip-tokenizer-init): use /generate with "
                "input_ids"
            )
        return self.tokenizer


class OpenAiCalls:
    """The parsers of one server; they raise InvalidRequestError and may run in any thread."""

    def __init__(self, config: ServerConfig, model: ServedModel) -> None:
        self.answers = answer_format(config, model.tokenizer, model.chat_template)
        self._server = Server(
            model_name=config.model_name,
            reports_cached=config.enable_cache_report,
            max_prompts=config.max_batch_requests,
            answers=self.answers,
        )
        self._model = model
        self.by_path: dict[str, CallParser] = {
            "/v1/completions": self.completion,
            "/v1/chat/completions": self.chat,
            "/v1/embeddings": self.embeddings,
        }

    @property
    def model_name(self) -> str:
        return self._server.model_name

    def completion(self, body: bytes) -> tuple[GenerationCall, Reply]:
        parsed = parse_completion(body, self._server)
        return parsed.call, CompletionReply(parsed, self._model.need_tokenizer())

    def chat(self, body: bytes) -> tuple[GenerationCall, Reply]:
        parsed = parse_chat(body, self._server, self._model.chat_template)
        return parsed.call, ChatReply(parsed, self._model.need_tokenizer())

    def embeddings(self, body: bytes) -> tuple[GenerationCall, WholeReply]:
        parsed = parse_embeddings(body, self._server, self._model.vector_sizes)
        return parsed.call, EmbeddingsReply(parsed)
