"""What a step found: a JSON line a check, appended to the file that `gpu_check.py` reads."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Findings:
    """`ok` of a check is None where there was nothing to compare, only a figure to report."""

    path: Path

    def add(self, check: str, ok: bool | None, **figures: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"check": check, "ok": ok, **figures}) + "\n")


def parser() -> argparse.ArgumentParser:
    """The options that every step has."""
    options = argparse.ArgumentParser()
    options.add_argument("--device", choices=("cuda", "cpu"), required=True)
    options.add_argument("--found", type=lambda name: Findings(Path(name)), required=True)
    options.add_argument("--quick", action="store_true")
    return options
