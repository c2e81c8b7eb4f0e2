"""What client libraries of PyPI get from one server with a real model: a test for each check.

The checks are functions in tests/clients/checks. They run in the environments that `make test`
makes in .venv/clients, all at the same time, and each tells here how it ended.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pipeline.server import ROOT, Server

FOLDER = ROOT / "tests" / "clients"
ENVIRONMENTS = Path(sys.prefix) / "clients"
API_KEY = "sk-checks"
RUN_TIMEOUT_S = 280.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FLAGS = ["--dtype", "float32", "--num-cpu-threads", "1", "--api-key", API_KEY]
FLAGS += ["--served-model-name", "demo/SmolLM2-135M-Instruct", "--enable-cache-report"]
OPENAI = sorted(path.stem for path in FOLDER.glob("checks/openai_*.py"))
OPENAI.remove("openai_client")
CLIENTS = {
    "openai-1": (ENVIRONMENTS / "openai-1/bin/python", OPENAI),
    "openai-2": (ENVIRONMENTS / "frameworks/bin/python", OPENAI),
    "openai-3": (Path(sys.executable), OPENAI),
    "frameworks": (
        ENVIRONMENTS / "frameworks/bin/python",
        ["langchain", "llama_index", "lite_llm", "examples"],
    ),
}


def names_of(module: str) -> list[str]:
    """The checks of a module, which cannot be imported here."""
    tree = ast.parse((FOLDER / "checks" / f"{module}.py").read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = [node.name for node in tree.body if isinstance(node, kinds)]
    return [f"{module}.{name}" for name in names if name.startswith("check_")]


CHECKS = [
    (client, name)
    for client, (_, modules) in CLIENTS.items()
    for module in modules
    for name in names_of(module)
]


@dataclass
class Run:
    """The checks of one client: a process, and what it has told when it has ended."""

    process: subprocess.Popen[str]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    complaints: str = ""

    def wait(self) -> None:
        if self.process.stdout is not None and self.process.stdout.closed:  # it was read already
            return
        try:
            told, self.complaints = self.process.communicate(timeout=RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            told, self.complaints = self.process.communicate()
        lines = map(json.loads, told.splitlines())
        self.results = {line["check"]: line for line in lines}


def start(python: Path, modules: list[str], url: str) -> Run:
    environment = os.environ | {
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": API_KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no request to the internet
    }
    environment.pop("VIRTUAL_ENV", None)
    environment["PYTHONPATH"] = str(ROOT)  # the language, which needs nothing else of ours
    pipe = subprocess.PIPE
    command = [str(python), str(FOLDER / "run.py"), *modules]
    return Run(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    with Server(FLAGS, tmp_path_factory.mktemp("server")) as server:
        runs = {
            client: start(python, modules, f"http://127.0.0.1:{server.port}")
            for client, (python, modules) in CLIENTS.items()
            if python.exists()
        }
        yield runs
        for run in runs.values():
            run.process.kill()
            run.wait()


def test_all_clients_are_installed() -> None:
    missing = [client for client, (python, _) in CLIENTS.items() if not python.exists()]
    assert not missing, f"run `make test`, or `scripts/install {sys.prefix} dev`"


@pytest.mark.parametrize(("client", "check"), CHECKS, ids=map("-".join, CHECKS))
def test_client(client: str, check: str, runs: dict[str, Run]) -> None:
    if client not in runs:
        pytest.skip("not installed: see test_all_clients_are_installed")
    runs[client].wait()
    assert check in runs[client].results, f"it did not run\n{runs[client].complaints[-4000:]}"
    error = runs[client].results[check]["error"]
    assert error is None, error
