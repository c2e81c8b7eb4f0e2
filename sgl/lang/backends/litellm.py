"""Any provider that LiteLLM knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl.lang.backends.api import MAX_RETRIES, missing
from sgl.lang.backends.openai import OpenAIProtocol


class LiteLLM(OpenAIProtocol):
    """A model behind LiteLLM, by a name such as "provider/model".

    chat_template    a name: how roles are written in the text of programs
    timeout          of a request, in seconds
    default_headers  of every request

    Raises ImportError where LiteLLM is not installed.
    """

    def __init__(
        self,
        model_name: str,
        chat_template: str | None = None,
        api_key: str | None = None,
        organization: str | None = None,
        base_url: str | None = None,
        timeout: float = 600,
        max_retries: int = MAX_RETRIES,
        default_headers: Mapping[str, str] | None = None,
    ) -> None:
        try:
            import litellm
        except ImportError:
            raise missing("litellm", "litellm", "LiteLLM") from None
        super().__init__(model_name, chat_template)
        self._litellm: Any = litellm
        given: dict[str, Any] = {
            "api_key": api_key,
            "organization": organization,
            "base_url": base_url,
            "extra_headers": dict(default_headers) if default_headers else None,
        }
        self._client_args = {name: value for name, value in given.items() if value is not None}
        self._client_args |= {"timeout": timeout, "max_retries": max_retries}

    async def chat(self, **fields: Any) -> Any:
        return await self._litellm.acompletion(**fields, **self._client_args)
