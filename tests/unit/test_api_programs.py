"""Thirty programs on models behind APIs: how many requests, and each of them in full."""

from __future__ import annotations

import json

import pytest
from api_calls import BACKENDS, FILE, calls
from programs import PROGRAMS


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_asks_what_it_is_known_to_ask(name, kind):
    known = json.loads(FILE.read_text("utf-8"))[name][kind]
    assert calls(name, kind) == known, "see scripts/make_api_calls.py"
