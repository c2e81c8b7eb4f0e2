"""What must be known of a server before a run: that it is there, its model, its tokenizer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from sgl.bench.servers import error_text
from sgl.bench.settings import ServingConfig
from sgl.errors import ConfigError
from sgl.model_files import find_tokenizer
from sgl.tokenizer import Tokenizer

POLL_S = 0.25
PROBE_TIMEOUT = aiohttp.ClientTimeout(total=10)
FLUSH_PATIENCE_S = 10.0  # the end of the last request may not have reached the scheduler yet
FLUSH_PATHS = ("/flush_cache", "/reset_prefix_cache")  # sgl and SGLang; vLLM
DEFAULT_VOCAB_SIZE = 32000


@dataclass(frozen=True, slots=True)
class Target:
    """The server as far as a run must know it; `tokenizer` is None where none was found."""

    model: str
    tokenizer: Tokenizer | None
    tokenizer_path: str | None
    vocab_size: int


async def wait_until_ready(session: aiohttp.ClientSession, config: ServingConfig) -> None:
    """Return once the server takes requests; raises ConfigError after --ready-timeout."""
    end = time.monotonic() + config.ready_timeout
    while (reason := await _not_ready(session, config.url)) is not None:
        if time.monotonic() >= end:
            raise ConfigError(
                f"{config.url} is not ready after {config.ready_timeout:g} s ({reason}): start a "
                "server with `sgl serve`, or say where it is with --port or --base-url"
            )
        await asyncio.sleep(POLL_S)


async def discover(session: aiohttp.ClientSession, config: ServingConfig) -> Target:
    """The model's name and tokenizer, as told by flags or else by the server."""
    cards = (await _get_json(session, f"{config.url}/v1/models")).get("data")
    card = cards[0] if isinstance(cards, list) and cards and isinstance(cards[0], dict) else {}
    info = await _get_json(session, f"{config.url}/get_model_info")
    model = config.model or card.get("id") or info.get("model_path")
    if model is None and config.server.api != "native":
        raise ConfigError(f"{config.url} does not tell its model's name: give --model")
    path, tokenizer = _find_tokenizer(config, card, info)
    known = tokenizer.vocab_size if tokenizer else info.get("vocab_size") or DEFAULT_VOCAB_SIZE
    return Target(
        model=str(model or "unknown"),
        tokenizer=tokenizer,
        tokenizer_path=path,
        vocab_size=config.vocab_size or int(known),
    )


async def flush_cache(session: aiohttp.ClientSession, config: ServingConfig) -> None:
    """Have the server forget cached prefixes; raises ConfigError where it does not."""
    end = time.monotonic() + FLUSH_PATIENCE_S
    while (refusal := await _flush_refusal(session, config.url)) is not None:
        status, reason = refusal
        if status != 400 or time.monotonic() >= end:  # 400: something runs
            raise ConfigError(f"--flush-cache: the server does not flush its cache ({reason})")
        await asyncio.sleep(POLL_S)


async def _flush_refusal(session: aiohttp.ClientSession, url: str) -> tuple[int, str] | None:
    """Status and words of the refusal; None once the cache is flushed."""
    refusal = None
    for path in FLUSH_PATHS:
        async with session.post(url + path, timeout=PROBE_TIMEOUT) as response:
            if response.status == 200:
                return None
            text = error_text(await response.read())
            refusal = response.status, f"{path}: status {response.status}, {text}"
        if response.status not in (404, 405):
            break
    return refusal


async def _not_ready(session: aiohttp.ClientSession, url: str) -> str | None:
    """Why the server takes no requests yet; None if it does."""
    try:
        async with session.get(f"{url}/health", timeout=PROBE_TIMEOUT) as response:
            # servers without this route are taken at their word that they answer at all
            return f"/health: status {response.status}" if response.status >= 500 else None
    except TimeoutError:
        return "/health: no answer"
    except (aiohttp.ClientError, OSError) as error:
        return str(error)


async def _get_json(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The JSON object there; empty where there is none. A missing key is a ConfigError."""
    try:
        async with session.get(url, timeout=PROBE_TIMEOUT) as response:
            if response.status in (401, 403):
                raise ConfigError(f"{url} asks for a key: give --api-key, or set SGL_API_KEY")
            content = orjson.loads(await response.read()) if response.status == 200 else {}
    except (aiohttp.ClientError, OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _find_tokenizer(
    config: ServingConfig, card: Mapping[str, Any], info: Mapping[str, Any]
) -> tuple[str | None, Tokenizer | None]:
    if config.tokenizer is not None:
        path = find_tokenizer(config.tokenizer, "--tokenizer")
        return path, Tokenizer.load(path)
    for path in _told_paths(config, card, info):
        try:
            return path, Tokenizer.load(path)
        except ConfigError:
            continue
    return None, None


def _told_paths(
    config: ServingConfig, card: Mapping[str, Any], info: Mapping[str, Any]
) -> Iterator[str]:
    """Names that are files of this machine; nothing is downloaded for a guess."""
    names = (config.model, info.get("tokenizer_path"), info.get("model_path"), card.get("root"))
    for name in names:
        if isinstance(name, str) and Path(name).expanduser().exists():
            yield str(Path(name).expanduser())
