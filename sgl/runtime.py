"""A server of this program's own, for programs of the language and over HTTP."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from sgl.config import FIELD_OPTIONS, OPTIONS, ServerConfig
from sgl.errors import BackendError, ConfigError
from sgl.lang.backends.runtime_endpoint import RuntimeEndpoint
from sgl.lang.loop import loop_thread
from sgl.processes import die_with_parent
from sgl.tokenizer import Tokenizer
from sgl.utils import http_request, terminate_process

FIRST_PORT, LAST_PORT = 30000, 65535
POLL_S = 0.2
HOST = "127.0.0.1"


class Runtime:
    """A server in a process of its own. Keywords are the server's flags.

        runtime = sgl.Runtime(model_path="…")
        sgl.set_default_backend(runtime)

    url, generate_url  where it is reached
    endpoint           the backend that reaches it

    It ends with `shutdown`, or with this program. Raises ConfigError if it cannot start as asked.
    """

    def __init__(self, log_level: str = "error", **flags: Any) -> None:
        flags = {"log_level": log_level, "host": HOST} | flags
        with _free_port(str(flags["host"]), flags.get("port")) as flags["port"]:
            config = ServerConfig.from_kwargs(**flags)
            self.url = f"http://{config.host}:{config.port}"
            self.generate_url = self.url + "/generate"
            self.endpoint: RuntimeEndpoint
            self._process = _start(OPTIONS.parse_values(flags))
            atexit.register(self.shutdown)
            try:
                self._wait_until_ready()
                self.endpoint = RuntimeEndpoint(self.url, config.api_key)
            except BaseException:
                self.shutdown()
                raise

    def shutdown(self) -> None:
        """End the server; a second time it does nothing."""
        atexit.unregister(self.shutdown)
        if self._process.poll() is None:
            terminate_process(self._process)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    def generate(
        self,
        prompt: str | Sequence[str],
        sampling_params: dict[str, Any] | None = None,
        **fields: Any,
    ) -> str:
        """The JSON that `/generate` answers. `fields` are further ones of it."""
        asked = {"text": prompt, "sampling_params": sampling_params or {}} | fields
        return json.dumps(loop_thread().wait_for(self.endpoint.ask(asked)))

    def encode(self, prompt: str | Sequence[str]) -> str:
        """The JSON that `/encode` answers; a server started with is_embedding=True."""
        return json.dumps(loop_thread().wait_for(self.endpoint.encode(prompt)))

    async def async_generate(
        self, prompt: str, sampling_params: dict[str, Any] | None = None
    ) -> AsyncIterator[str]:
        """The pieces of the text, on any event loop."""
        asked = {"text": prompt, "sampling_params": sampling_params or {}, "stream": True}
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

        async def fetch() -> None:
            end: BaseException | None = None
            num_told = 0
            try:
                async for event in self.endpoint.ask_streamed(asked):
                    text = event["text"]
                    loop.call_soon_threadsafe(pieces.put_nowait, text[num_told:])
                    num_told = len(text)
            except Exception as error:
                end = error
            with suppress(RuntimeError):  # who asked is gone
                loop.call_soon_threadsafe(pieces.put_nowait, end)

        fetching = loop_thread().submit(fetch())
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            fetching.cancel()

    add_request = async_generate

    async def get_server_info(self) -> dict[str, Any]:
        asking = loop_thread().submit(self.endpoint.server_info())
        return await asyncio.wrap_future(asking) or {}

    def cache_prefix(self, prefix: str) -> None:
        """Compute a beginning that many prompts will share."""
        self.generate(prefix, {"max_new_tokens": 0})

    def get_tokenizer(self) -> Tokenizer:
        """The model's: it encodes and decodes."""
        return Tokenizer.load(self.endpoint.model_info["tokenizer_path"])

    def _wait_until_ready(self) -> None:
        while True:
            if (code := self._process.poll()) is not None:
                raise ConfigError(
                    f"the server ended with exit code {code} before it was ready; what it said is "
                    'above (log_level="info" says more)'
                )
            with suppress(OSError):
                if http_request(self.url + "/health").status_code == 200:
                    return
            time.sleep(POLL_S)


def _start(values: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "sgl.launch_server"]
    environment = dict(os.environ)
    for option in FIELD_OPTIONS:
        value = values.get(option.key)
        if value is None or value is False:
            continue
        if option.flag.is_secret:  # command lines are for all to read
            environment[f"SGL_{option.flag.env}"] = str(value)
            continue
        argv.append(option.names[0])
        if value is not True:
            argv += map(str, value if isinstance(value, tuple) else [value])
    die: Callable[[], None] | None = None
    if threading.current_thread() is threading.main_thread():  # the kernel watches the thread
        die = partial(die_with_parent, os.getpid())
    # an interrupt, from a terminal or a notebook's stop button, is for this program alone
    return subprocess.Popen(argv, env=environment, preexec_fn=die, process_group=0)


@contextmanager
def _free_port(host: str, wanted: Any) -> Iterator[int]:
    """One that no other Runtime takes meanwhile, which may not listen yet either."""
    if wanted is not None:
        yield int(wanted)
        return
    for port in range(FIRST_PORT, LAST_PORT + 1):
        with socket.socket(socket.AF_UNIX) as claim:  # an abstract name, which ends with it
            try:
                claim.bind(f"\0sgl runtime {port}")
                socket.create_server((host, port)).close()
            except OSError:
                continue
            yield port
            return
    raise BackendError(f"no port from {FIRST_PORT} on is free at {host}")
