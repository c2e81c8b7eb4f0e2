"""The option `--full`: everything that takes minutes on two cores. And Triton without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if not any(Path("/dev").glob("nvidia[0-9]*")):  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        default=os.environ.get("SGL_FULL", "") not in ("", "0"),
        help="compare all prompts and requests, not some of each kind (also: SGL_FULL=1)",
    )


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether time does not matter."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session", autouse=True)
def _state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Servers keep files below this, not in the home of whoever runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
