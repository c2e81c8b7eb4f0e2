"""Writes tests/data/api_calls.json: what programs ask of models behind APIs. Read what changed.

PYTHONPATH=.:tests python scripts/make_api_calls.py
"""

from __future__ import annotations

import json

from api_calls import BACKENDS, FILE, calls
from programs import PROGRAMS


def main() -> None:
    found = {name: {kind: calls(name, kind) for kind in BACKENDS} for name in PROGRAMS}
    FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
