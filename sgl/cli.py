"""The command `sgl`: a table of verbs, each loaded only when it is typed."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from sgl.config import FIELD_OPTIONS, ServerConfig
from sgl.errors import ConfigError
from sgl.flags import field_options
from sgl.hardware import choose_device, num_usable_cores, package_version
from sgl.help import help_text
from sgl.model_files import is_hub_id, resolve_model_path


@dataclass(frozen=True, slots=True)
class Command:
    """One verb; `run`, `flags` and `groups` are "module:name", loaded when the verb is typed.

    run     takes the words after the verb and returns an exit code
    flags   the config class those words fill, if any
    groups  headings of its help: heading -> first field below it
    more    last line of its help
    """

    usage: str
    summary: str
    run: str
    flags: str | None = None
    groups: str | None = None
    more: str = ""


_SERVER_GROUPS = "sgl.config:GROUPS"
_SERVER_MORE = "Options of SGLang that are accepted or refused: docs/flags.md"
_OFFLINE_MORE = "Besides these, all flags of the server: sgl serve --help"

COMMANDS = {
    "serve": Command(
        "serve [MODEL] [flags]",
        "serve a model over HTTP",
        "sgl.cli:serve",
        "sgl.config:ServerConfig",
        _SERVER_GROUPS,
        _SERVER_MORE,
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
        _SERVER_GROUPS,
        _SERVER_MORE,
    ),
    "bench serving": Command(
        "bench serving [flags]",
        "send many requests to a running server and measure it",
        "sgl.bench.serving:run",
        "sgl.bench.settings:ServingConfig",
        "sgl.bench.settings:GROUPS",
        "What is sent and what the numbers mean: docs/benchmarks.md",
    ),
    "bench latency": Command(
        "bench latency [flags]",
        "measure one batch in an engine of its own, step by step",
        "sgl.offline.latency:run",
        "sgl.offline.settings:LatencyConfig",
        more=_OFFLINE_MORE,
    ),
    "bench offline-throughput": Command(
        "bench offline-throughput [flags]",
        "measure many requests at once in an engine of its own",
        "sgl.offline.throughput:run",
        "sgl.offline.settings:ThroughputConfig",
        more=_OFFLINE_MORE,
    ),
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
        case [first, second, *rest] if f"{first} {second}" in COMMANDS:
            return run_command(f"{first} {second}", rest)
        case [verb, *rest] if verb in COMMANDS:
            return run_command(verb, rest)
        case [verb] | [verb, "--help" | "-h"] if usages := _usages_below(verb):
            print(f"usage: sgl {verb} COMMAND\n\n{usages}")
            return 0
        case [verb, second, *_] if usages := _usages_below(verb):
            print(f"sgl {verb} has no command {second!r}\n\n{usages}", file=sys.stderr)
            return 2
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
    width = min(shutil.get_terminal_size().columns, 100)
    groups = _load(command.groups) if command.groups else None
    flags = help_text(field_options(_load(command.flags)), width, groups)
    return "\n\n".join([text, flags, command.more]).rstrip()


def _with_model(argv: list[str]) -> list[str]:
    """`serve MODEL …` is `serve --model-path MODEL …`."""
    if argv and not argv[0].startswith("-"):
        return ["--model-path", *argv]
    return argv


def _overview() -> str:
    table = _usage_table(COMMANDS.values())
    return f"usage: sgl COMMAND\n\n{table}\n\nsgl COMMAND --help lists the flags of a command."


def _usages_below(verb: str) -> str:
    """The commands of two words that begin with `verb`; empty where there are none."""
    commands = [command for name, command in COMMANDS.items() if name.startswith(f"{verb} ")]
    return _usage_table(commands) if commands else ""


def _usage_table(commands: Iterable[Command]) -> str:
    usages = [(command.usage, command.summary) for command in commands]
    width = max(len(usage) for usage, _ in usages)
    return "\n".join(f"  sgl {usage:{width}}  {summary}" for usage, summary in usages)


if __name__ == "__main__":
    sys.exit(main())
