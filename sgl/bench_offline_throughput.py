"""`python -m sgl.bench_offline_throughput …`: the same as `sgl bench offline-throughput`."""

from __future__ import annotations

import sys

from sgl.cli import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("bench offline-throughput", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
