"""One file of tests, those marked `gpu` (on the CPU: the others); each failure is a line."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from scripts.gpu_steps.findings import parser

MAX_SHOWN = 8  # failures of a file; the log has all


def main() -> int:
    options = parser()
    options.add_argument("file")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        marked = "gpu" if arguments.device == "cuda" else "not gpu"
        # other packages' plugins may warn, and a warning fails a test here
        plugins = ("-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist")
        output = ("-o", "junit_family=xunit1", f"--junitxml={report}")
        code = subprocess.call(
            [sys.executable, "-m", "pytest", "-m", marked, *plugins, *output, arguments.file]
        )
        if report.exists():
            _add_cases(ElementTree.parse(report).iter("testcase"), arguments.found)
    return code


def _add_cases(cases, found) -> None:
    num_passed, num_failed, errors = 0, 0, [0.0]
    for case in cases:
        problems = [*case.iter("failure"), *case.iter("error")]
        figures = {item.get("name"): item.get("value") for item in case.iter("property")}
        errors.append(float(figures.get("max_error", 0.0)))
        if problems and num_failed < MAX_SHOWN:
            found.add(case.get("name"), False, why=(problems[0].get("message") or "")[:500])
        num_failed += bool(problems)
        num_passed += not problems and case.find("skipped") is None
    is_ok = num_passed > 0 and num_failed == 0
    found.add("all", is_ok, passed=num_passed, failed=num_failed, max_error=max(errors))


if __name__ == "__main__":
    sys.exit(main())
