"""A server of ours, over HTTP."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp

from sgl.errors import BackendError
from sgl.lang.backends.http import http_session
from sgl.lang.backends.native import Fields, NativeBackend, written_template
from sgl.lang.chat_template import ChatTemplate, template_of
from sgl.lang.loop import loop_thread

MAX_ERROR_CHARS = 500


class RuntimeEndpoint(NativeBackend):
    """A server that runs, by its address.

    api_key             of the server, if it wants one
    verify              False: any certificate will do; a path: of the authority that signed it
    chat_template_name  how roles are written, if not as the server's model says

    Raises BackendError where nothing answers.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: bool | str | None = None,
        chat_template_name: str | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._tls: ssl.SSLContext | bool = verify is not False
        if isinstance(verify, str):
            self._tls = ssl.create_default_context(cafile=verify)
        self.model_info: Fields = loop_thread().wait_for(self._get("/get_model_info"))
        self.keeps_tokens = bool(self.model_info.get("keeps_tokens"))
        self.chat_template = self._template(chat_template_name)

    async def ask(self, fields: Fields) -> Any:
        return await self._post("/generate", fields)

    async def ask_streamed(self, fields: Fields) -> AsyncIterator[Fields]:
        try:
            async with self._request("POST", "/generate", fields) as response:
                await _check(response)
                async for line in response.content:
                    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                        continue
                    event = json.loads(line[6:])
                    if error := event.get("error"):
                        raise BackendError(_message(error))
                    yield event
        except aiohttp.ClientError as error:
            raise self._lost(error) from error

    async def tokenize(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        fields = {"text": list(texts), "add_special_tokens": add_special_tokens}
        tokens: list[list[int]] = (await self._post("/tokenize", fields))["tokens"]
        return tokens

    async def encode(self, prompt: str | Sequence[str]) -> Any:
        """The vectors of prompts, of a server that gives them."""
        return await self._post("/encode", {"text": prompt})

    async def flush_cache(self) -> bool:
        try:
            await self._post("/flush_cache", {})
        except BackendError:  # requests are running
            return False
        return True

    async def server_info(self) -> dict[str, Any] | None:
        info: dict[str, Any] = await self._get("/get_server_info")
        return info

    def get_model_name(self) -> str:
        return str(self.model_info["model_path"])

    def _template(self, name: str | None) -> ChatTemplate:
        return written_template(self.model_info) if name is None else template_of(name)

    def _request(
        self, method: str, path: str, fields: Fields | None = None
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        url = self.base_url + path
        return http_session().request(
            method, url, json=fields, headers=self._headers, ssl=self._tls
        )

    async def _get(self, path: str) -> Any:
        try:
            async with self._request("GET", path) as response:
                await _check(response)
                return await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._lost(error) from error

    async def _post(self, path: str, fields: Fields) -> Any:
        try:
            async with self._request("POST", path, fields) as response:
                await _check(response)
                is_json = response.content_type == "application/json"
                return await (response.json() if is_json else response.text())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> BackendError:
        why = str(error) or type(error).__name__
        return BackendError(
            f"the server at {self.base_url} does not answer: {why}. `sgl serve` starts one"
        )


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status >= 400:
        body = await response.text()
        try:
            told = _message(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError):
            told = body[:MAX_ERROR_CHARS]
        raise BackendError(f"{response.url.path} answered {response.status}: {told}")


def _message(error: Any) -> str:
    return str(error["message"] if isinstance(error, dict) else error)[:MAX_ERROR_CHARS]
