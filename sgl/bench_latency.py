"""`python -m sgl.bench_latency --model-path …`: the same as `sgl bench latency`."""

from __future__ import annotations

import sys

from sgl.cli import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("bench latency", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
