"""What runs of an engine cost its processes in CPU time, as the kernel counts it in /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TITLE = "sgl::"  # how the titles of the engine's processes begin
STATE = 3  # the first field of proc(5)'s `stat` behind the name, which may hold spaces and brackets
PARENT, USER_TICKS, SYSTEM_TICKS = 4 - STATE, 14 - STATE, 15 - STATE


@dataclass(frozen=True, slots=True)
class Spent:
    """Steps, seconds, and seconds of CPU by process: since some moment, or between two looks."""

    num_steps: int
    wall_s: float
    cpu_s: dict[str, float]

    def __sub__(self, other: Spent) -> Spent:
        return Spent(
            self.num_steps - other.num_steps,
            self.wall_s - other.wall_s,
            {name: seconds - other.cpu_s[name] for name, seconds in self.cpu_s.items()},
        )


def cpu_seconds(pid: int, proc: Path = PROC) -> float:
    """Of all threads of a process since its start, rounded down to clock ticks (10 ms)."""
    fields = _fields(proc / str(pid))
    ticks = int(fields[USER_TICKS]) + int(fields[SYSTEM_TICKS])
    return ticks / os.sysconf("SC_CLK_TCK")


def engine_processes(caller: int, proc: Path = PROC) -> dict[str, int]:
    """Name -> process id: the caller, and the processes of its engine."""
    found = {}
    for folder in proc.glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            title = (folder / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
            if title.startswith(TITLE) and int(_fields(folder)[PARENT]) == caller:
                found[title.removeprefix(TITLE)] = int(folder.name)
    return {"caller": caller} | dict(sorted(found.items()))


def _fields(folder: Path) -> list[str]:
    text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()
