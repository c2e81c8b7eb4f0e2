"""The notebook about the language runs, and what its cells print is as it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from ast import literal_eval
from calendar import month_name
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from pipeline.server import ROOT, processes_of_session, wait_until

from scripts.run_notebook import CellError, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FOLDER = ROOT / "docs" / "lang"
NOTEBOOK = FOLDER / "notebook.ipynb"
SCRIPT = ROOT / "scripts" / "run_notebook.py"

# All that a kernel starts is in a session of its own.
TELL_SESSION = """\
import os, pathlib
pathlib.Path("session").write_text(str(os.getsid(0)))"""
START_SERVER = """\
import sgl
runtime = sgl.Runtime()
assert os.getsid(runtime._process.pid) == os.getsid(0)"""

FAILURES = {
    "1 / 0": "ZeroDivisionError: division by zero",
    "os.kill(os.getpid(), 9)": "Kernel died",
}


@pytest.fixture(scope="module", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server's threads sleep where they wait for each other, as in test_snippets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOMP_SPINCOUNT", "0")
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cells of a copy, by their names, after it ran."""
    path = tmp_path_factory.mktemp("notebook") / "copy.ipynb"
    cells = [new_code_cell(TELL_SESSION, id="session")]
    cells += [new_code_cell(cell.source, id=cell.id) for cell in code_cells(NOTEBOOK)]
    nbformat.write(new_notebook(cells=cells), path)
    run(path)
    check_all_ended(path.parent)
    _, *ran = code_cells(path)
    return {cell.id: cell for cell in ran}


def code_cells(path: Path) -> list[Any]:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_all_ended(folder: Path) -> None:
    session = int((folder / "session").read_text())
    ended = wait_until(lambda: not processes_of_session(session), 10.0)
    assert ended, processes_of_session(session)


def kinds(cell: Any) -> list[Any]:
    """What it shows, and where, but not the texts."""
    return [(each.output_type, each.get("name"), *each.get("data", ())) for each in cell.outputs]


def printed(cell: Any) -> str:
    return "".join(each.text for each in cell.outputs if each.output_type == "stream")


def value(cell: Any) -> Any:
    """Of the expression in its last line."""
    [text] = [each.data["text/plain"] for each in cell.outputs if "data" in each]
    return literal_eval(text)


def test_cells_show_what_is_committed(ran):
    committed = code_cells(NOTEBOOK)
    assert list(ran) == [cell.id for cell in committed]
    for cell in committed:
        assert kinds(cell) == kinds(ran[cell.id]), cell.id
        assert all(kind[:2] != ("stream", "stderr") for kind in kinds(cell)), cell.id
        assert all(kind[0] != "error" for kind in kinds(cell)), cell.id


def test_nothing_committed_differs_between_runs():
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    shown = json.dumps([cell["outputs"] for cell in cells])
    assert not re.search(r"(?<!\S)/(home|root|tmp|usr|work)/", shown)


def test_links_lead_somewhere():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    links = re.findall(r"\]\(([^)#]+)", "\n".join(prose))
    assert {"tutorial.md", "reference.md", "../../examples/README.md"} <= set(links)
    assert all((FOLDER / link).exists() for link in links)


def test_conversation(ran):
    lines = printed(ran["conversation"]).splitlines()
    roles = [line.partition(": ")[0] for line in lines]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert "Shakespeare" in lines[2]
    assert lines[4] == f"assistant: {value(ran['variable'])}"


def test_control_flow(ran):
    lines = printed(ran["control_flow"]).splitlines()
    told = r'The sentence "[^"]+" is about (cooking|sports|weather)\.( On such a day, .+\.)?'
    found = [re.fullmatch(told, line) for line in lines]
    assert len(found) == 2
    for match in found:
        assert match is not None
        assert (match[1] == "weather") == (match[2] is not None)


def test_fork(ran):
    sides = value(ran["fork"])
    assert len(sides) == len(set(sides)) == 2
    assert all(side.strip() for side in sides)


def test_answers_of_a_form(ran):
    months = "|".join(month_name[1:])
    assert re.fullmatch(rf"({months}) ([12][0-9]|3[01]|[1-9])", value(ran["regex"]))
    person = value(ran["json_schema"])
    types = {"name": str, "age": int, "city": str, "has_dog": bool}
    assert {name: type(each) for name, each in person.items()} == types
    assert 0 <= value(ran["dtype"]) <= 7 * 99
    assert value(ran["dtype"]) % 7 == 0


def test_batch(ran):
    lines = printed(ran["batch"]).splitlines()
    words = [line.partition(": ")[0] for line in lines]
    assert words == ["hot", "dark", "rich", "old", "wet", "loud"]
    assert lines[0] == "hot: cold"


@pytest.mark.parametrize("name", ["text_iter", "text_async_iter"])
def test_streams(ran, name):
    *pieces, end = printed(ran[name]).split("|")
    assert end == ""
    assert len(pieces) > 1
    assert all(pieces)


def test_roles(ran):
    assert value(ran["roles"]) is True
    assert printed(ran["roles"]).startswith("<|im_start|>system\nYou answer in one short sentence.")
    assert "<|im_start|>assistant\nIt has" in printed(ran["roles"])


def test_errors(ran):
    assert "unterminated character set" in printed(ran["wrong_argument"])
    refused, note = printed(ran["refused"]).splitlines()
    assert "longer than the model's context length" in refused
    assert note == "in program 'story', variable 'rest'"
    unknown = printed(ran["unknown_variable"])
    assert "no variable 'otherplay'; it has: writer, other_play" in unknown


def test_meta_info(ran):
    told = value(ran["meta_info"])
    assert 0 < told["prompt_tokens"] / 2 < told["cached_tokens"] < told["prompt_tokens"]
    assert 0 < told["completion_tokens"] <= 32


@pytest.mark.parametrize("failing", FAILURES)
def test_a_server_ends_with_its_kernel(failing, tmp_path):
    path = tmp_path / "failing.ipynb"
    cells = [new_code_cell(each) for each in (TELL_SESSION, START_SERVER, failing)]
    nbformat.write(new_notebook(cells=cells), path)
    before = path.read_bytes()
    with pytest.raises(CellError) as raised:
        run(path)
    assert str(raised.value) == f"{failing}\n\n{FAILURES[failing]}"
    assert path.read_bytes() == before
    check_all_ended(tmp_path)


def test_the_script_shows_the_cell_that_failed(tmp_path):
    path = tmp_path / "failing.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1"), new_code_cell("x + y")]), path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "a cell failed\n\nx + y\n\nNameError: name 'y' is not defined" in done.stderr
    assert "x = 1" not in done.stderr
