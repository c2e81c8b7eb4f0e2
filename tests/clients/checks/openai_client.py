"""The clients of the openai checks, and what is spelled differently in old versions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import openai

from checks.common import API_KEY, BASE_URL, TIMEOUT_S

client = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S)
async_client = openai.AsyncOpenAI(
    base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S
)


def newest(of: openai.OpenAI | openai.AsyncOpenAI) -> Any:
    """The chat completions that have `parse` and `stream`: in 1.x they were in beta at first."""
    completions = of.chat.completions
    return completions if hasattr(completions, "parse") else of.beta.chat.completions


def content(completion: Any) -> str:
    text = completion.choices[0].message.content
    assert isinstance(text, str)
    return text


def raised(
    kind: type[openai.APIError], call: Callable[..., Any], *arguments: Any, **fields: Any
) -> Any:
    """The error of exactly this kind that the call ends with."""
    error: Any = None
    try:
        call(*arguments, **fields)
    except openai.APIError as caught:
        error = caught
    assert type(error) is kind, repr(error)
    return error


def wait_until(holds: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
