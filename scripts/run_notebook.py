"""Execute a notebook and write it back with what its cells print.

    python scripts/run_notebook.py docs/lang/notebook.ipynb

What changes from run to run is left out: times, versions, and the paths of this machine. A cell that
fails is shown with its error, the file is left as it was, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120  # of one cell


class CellError(Exception):
    """A cell that failed: its source, and what it failed with."""


def run(path: Path) -> None:
    """Raises CellError. The kernel works in the notebook's folder, with this repository's `sgl`."""
    notebook = nbformat.read(path, as_version=4)
    begun: list[Any] = []
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=TIMEOUT_S,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        on_cell_execute=lambda cell, cell_index: begun.append(cell),
    )
    try:
        client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    except (CellControlSignal, DeadKernelError) as error:
        raise CellError(f"{begun[-1].source}\n\n{_told(error)}") from error
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell["outputs"] = [_without_paths(output) for output in cell.get("outputs", ())]
    nbformat.write(notebook, path)
