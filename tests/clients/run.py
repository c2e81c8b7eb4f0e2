"""Runs the checks of some modules: run.py MODULE ... prints one line of JSON for each check.

    {"check": "openai_chat.check_answer", "error": null, "seconds": 0.31}

A check is a function check_* of a module in checks/. This runs in the environment of the client
libraries, so it needs nothing but the standard library. Some checks run at a time: the server
answers several requests almost as fast as one. All async checks share one event loop, because a
client keeps connections, and those belong to the loop in which they were made.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

NUM_AT_A_TIME = 6


def checks_of(module: str) -> Iterator[tuple[str, Any]]:
    """In the order of the file."""
    for name, value in vars(import_module(f"checks.{module}")).items():
        if name.startswith("check_"):
            yield f"{module}.{name}", value


async def error_of(check: Any) -> str | None:
    """What went wrong, as a traceback."""
    try:
        if inspect.iscoroutinefunction(check):
            await check()
        else:
            await asyncio.to_thread(check)  # frameworks refuse to run where a loop runs
    except Exception:
        return traceback.format_exc()
    return None


async def run(modules: list[str], results: Any) -> None:
    turn = asyncio.Semaphore(NUM_AT_A_TIME)

    async def report(name: str, check: Any) -> None:
        async with turn:
            started = time.monotonic()
            error = await error_of(check)
            seconds = round(time.monotonic() - started, 2)
            line = {"check": name, "error": error, "seconds": seconds}
            print(json.dumps(line), file=results, flush=True)

    checks = [pair for module in modules for pair in checks_of(module)]
    await asyncio.gather(*(report(name, check) for name, check in checks))


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # some libraries print
        asyncio.run(run(sys.argv[1:], sys.__stdout__))
