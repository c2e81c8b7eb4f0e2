"""The pages about the API: their examples run, their links lead somewhere, what is made is new."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
from pathlib import Path

import pytest
from ingress_server import in_thread

import sgl
import sgl.lang.program
import sgl.lang.state
import sgl.utils

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
URL = "http://127.0.0.1:30000"
ROLES, ENDS = ("system", "user", "assistant"), ("begin", "end")
PAGES = sorted(page for page in (DOCS / "api").glob("*.md") if page.name != "engine.md")
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")
SHELL = """\
set -euo pipefail
curl() { command curl --silent --show-error --fail-with-body "$@"; echo; }
"""


def code_of(page: Path, language: str) -> str:
    """All examples of a page that are in `language`, as one program."""
    text = page.read_text(encoding="utf-8")
    return "\n".join(each["code"] for each in BLOCK.finditer(text) if each["language"] == language)


def anchors_of(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [DOCS / "api.md", *PAGES], ids=lambda page: page.stem)
def test_the_examples_run(page: Path, tmp_path: Path) -> None:
    shell, python = code_of(page, "bash"), code_of(page, "python")
    if page.stem == "parameters":
        assert not shell + python
        return
    with in_thread(file_storage_path=str(tmp_path / "files")) as s:
        done = subprocess.run(
            ["bash", "-c", SHELL + shell.replace(URL, s.url)],
            cwd=tmp_path,
            env=os.environ | {"SGL_API_KEY": "none"},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip() or not shell
        exec(compile(python.replace(URL, s.url), str(page), "exec"), {})


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.finditer(text):
        if link["path"].startswith(("http:", "https:")):
            continue
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        assert target.exists(), link[0]
        if link["anchor"] and target.suffix == ".md":
            assert link["anchor"] in anchors_of(target), link[0]


def test_the_reference_of_the_language_names_everything() -> None:
    page = (DOCS / "lang" / "reference.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", page))
    functions = {name for name, value in vars(sgl.utils).items() if inspect.isfunction(value)} & {
        name for name in vars(sgl.utils) if not name.startswith("_")
    }
    keywords = [*inspect.signature(sgl.gen).parameters]
    for run in (sgl.lang.program.Function.run, sgl.lang.program.Function.run_batch):
        keywords += inspect.signature(run).parameters
    methods = [
        name
        for kind in (sgl.lang.state.ProgramState, sgl.lang.program.Function)
        for name in vars(kind)
        if not name.startswith("_")
    ]
    known = {*sgl.__all__, *functions, *keywords, *methods} - {"__version__", "self", "args"}
    known -= {"arguments", "batch_kwargs"} | {f"{role}_{end}" for role in ROLES for end in ENDS}
    assert not known - words


def test_the_parameters_are_those_of_the_types() -> None:
    spec = importlib.util.spec_from_file_location(
        "parameters_doc", ROOT / "scripts" / "parameters_doc.py"
    )
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    written = (DOCS / "api" / "parameters.md").read_text(encoding="utf-8")
    assert written == made.document(), "run `make docs`"
