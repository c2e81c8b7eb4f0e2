"""The command `sgl`: a table of verbs, each loaded only when it is typed."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from sgl.config import FIELD_OPTIONS, GROUPS, ServerConfig
from sgl.errors import ConfigError
from sgl.flags import field_options
from sgl.hardware import choose_device, num_usable_cores, package_version
from sgl.help import help_text
from sgl.model_files import is_hub_id, resolve_model_path


@dataclass(frozen=True, slots=True)
class Command:
    """One verb; `run` and `flags` are "module:name", loaded when the verb is typed.

    run    takes the words after the verb and returns an exit code
    flags  the config class those words fill, if any
    """

    usage: str
    summary: str
    run: str
    flags: str | None = None


COMMANDS = {
    "serve": Command(
        "serve [MODEL] [flags]",
        "serve a model over HTTP",
        "sgl.cli:serve",
        "sgl.config:ServerConfig",
    ),
    "chat": Command(
        "chat [flags]", "talk to a running server", "sgl.chat:main", "sgl.chat:ChatConfig"
    ),
    "doctor": Command(
        "doctor [flags]",
        "check this machine and say what to fix",
        "sgl.doctor:main",
        "sgl.doctor:DoctorConfig",
    ),
    "env": Command("env", "print versions and hardware, for bug reports", "sgl.doctor:print_env"),
    "check-config": Command(
        "check-config [MODEL] [flags]",
        "check the flags of serve and show what follows from them",
        "sgl.cli:check",
        "sgl.config:ServerConfig",
    ),
    "bench": Command("bench", "not in this release", "sgl.cli:bench"),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    match words:
        case [] | ["--help" | "-h" | "help", *_]:
            print(_overview())
            return 0
        case ["--version" | "-V", *_]:
            print(f"sgl {package_version('sgl') or '(not installed)'}")
            return 0
        case [verb, *rest] if verb in COMMANDS:
            return run_command(verb, rest)
        case [verb, *_]:
            print(f"sgl has no command {verb!r}\n\n{_overview()}", file=sys.stderr)
            return 2
    return 0


def run_command(verb: str, argv: list[str]) -> int:
    """Run one verb; the operator's mistakes become a paragraph on stderr and exit code 2."""
    command = COMMANDS[verb]
    if "--help" in argv or "-h" in argv:
        return _show(_help(command))
    run: Callable[[list[str]], int] = _load(command.run)
    try:
        return run(argv)
    except ConfigError as error:
        if "debug" in argv or "--log-level=debug" in argv:
            traceback.print_exc()
        print(f"sgl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def serve(argv: list[str]) -> int:
    config = ServerConfig.from_argv(_with_model(argv))
    from sgl.launch import serve as serve_until_stopped

    return serve_until_stopped(config)


def check(argv: list[str]) -> int:
    """What `serve` would run with, without starting anything or downloading the model."""
    config = ServerConfig.from_argv(_with_model(argv))
    device = choose_device(config.device, tp_size=config.tp_size, base_gpu_id=config.base_gpu_id)
    model = config.model_path
    if model is None or not is_hub_id(model) or Path(model).exists():
        model = resolve_model_path(config)
    for option in FIELD_OPTIONS:
        value = getattr(config, option.key)
        if value != option.default:
            print(f"{option.key} = {'(secret)' if option.flag.is_secret else value}")
    print(f"model = {model}\ndevice = {device}")
    limits = config.limits_on(device, num_cores=num_usable_cores())
    for name, value in asdict(limits).items():
        print(f"{name} = {value}")
    return 0


def bench(argv: list[str]) -> int:
    raise ConfigError("sgl bench is not in this release: send requests with any OpenAI benchmark")


def _show(page: str) -> int:
    """Print a long text; the reader may leave before its end, as `| head` does."""
    try:
        print(page, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return 0


def _load(path: str) -> Any:
    module_name, name = path.split(":")
    return getattr(import_module(module_name), name)


def _help(command: Command) -> str:
    """Usage, and every flag with its default."""
    text = f"usage: sgl {command.usage}\n\n{command.summary}"
    if command.flags is None:
        return text
    config_class = _load(command.flags)
    width = min(shutil.get_terminal_size().columns, 100)
    if config_class is not ServerConfig:
        return f"{text}\n\n{help_text(field_options(config_class), width)}"
    flags = help_text(FIELD_OPTIONS, width, GROUPS)
    return f"{text}\n\n{flags}\n\nOptions of SGLang that are accepted or refused: docs/flags.md"


def _with_model(argv: list[str]) -> list[str]:
    """`serve MODEL …` is `serve --model-path MODEL …`."""
    if argv and not argv[0].startswith("-"):
        return ["--model-path", *argv]
    return argv


def _overview() -> str:
    usages = [(command.usage, command.summary) for command in COMMANDS.values()]
    width = max(len(usage) for usage, _ in usages)
    table = "\n".join(f"  sgl {usage:{width}}  {summary}" for usage, summary in usages)
    return f"usage: sgl COMMAND\n\n{table}\n\nsgl COMMAND --help lists the flags of a command."


if __name__ == "__main__":
    sys.exit(main())
