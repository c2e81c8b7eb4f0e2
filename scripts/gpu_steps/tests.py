"""One file of tests, those marked `gpu` (on the CPU: the others); each failure is a line."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from scripts.gpu_steps.findings import parser


def main() -> int:
    options = parser()
    options.add_argument("file")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        marked = "gpu" if arguments.device == "cuda" else "not gpu"
        # other packages' plugins may warn, and a warning fails a test here
        command = ["-m", marked, "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist"]
        code = subprocess.call(
            [sys.executable, "-m", "pytest", *command, f"--junitxml={report}", arguments.file]
        )
        if report.exists():
            _add_cases(ElementTree.parse(report).iter("testcase"), arguments.found)
    return code


def _add_cases(cases, found) -> None:
    num_passed, num_skipped, errors = 0, 0, [0.0]
    for case in cases:
        problems = [*case.iter("failure"), *case.iter("error")]
        figures = {item.get("name"): item.get("value") for item in case.iter("property")}
        errors.append(float(figures.get("max_error", 0.0)))
        for problem in problems:
            found.add(case.get("name"), False, why=(problem.get("message") or "")[:500])
        is_skipped = case.find("skipped") is not None
        num_skipped += is_skipped
        num_passed += not problems and not is_skipped
    is_ok = num_passed > 0
    found.add("passed", is_ok, passed=num_passed, skipped=num_skipped, max_error=max(errors))


if __name__ == "__main__":
    sys.exit(main())
