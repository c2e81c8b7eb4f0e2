"""Execute a notebook and write it back with what its cells print.

    python scripts/run_notebook.py docs/lang/notebook.ipynb

What changes from run to run is left out: times, versions, and the paths of this machine. If a cell
fails, it is shown with its error, the file stays as it was, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from tempfile import gettempdir

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = re.compile(
    rf"({re.escape(str(ROOT))}|{re.escape(sys.prefix)}|{re.escape(gettempdir())}/ipykernel_\d+)/"
)
TIMEOUT_S = 120  # of one cell


class CellError(Exception):
    """A cell that failed: its source, and what it failed with."""


def run(path: Path) -> None:
    """The kernel works in the notebook's folder, with this repository's `sgl`. Raises CellError."""
    notebook = nbformat.read(path, as_version=4)
    begun: list[str] = []
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=TIMEOUT_S,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        config=Config(KernelManager={"transport_encryption": "auto"}),  # it warns without
        on_cell_execute=lambda cell, cell_index: begun.append(cell.source),
    )
    try:
        client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    except CellExecutionError as error:
        raise CellError(f"{begun[-1]}\n\n{error.ename}: {error.evalue}") from error
    except (CellControlSignal, DeadKernelError) as error:
        raise CellError(f"{begun[-1]}\n\n{error}") from error
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            told = FOLDERS.sub("", json.dumps(cell.outputs, ensure_ascii=False))
            cell.outputs = nbformat.from_dict(json.loads(told))
    nbformat.write(notebook, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path, help=".ipynb")
    path = parser.parse_args().notebook.resolve()
    try:
        run(path)
    except CellError as error:
        print(f"{path}: a cell failed\n\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
