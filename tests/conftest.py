"""The option `--full`: everything that takes minutes on two cores."""

from __future__ import annotations

import os

import pytest


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
