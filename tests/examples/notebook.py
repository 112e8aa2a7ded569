"""Runs the notebook, and writes what its cells show into it.

    pip install -e '.[server,examples]'
    python -m tests.examples.notebook

Its outputs are committed, so that it shows pictures where it is read; test_examples.py compares them with a run.
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tests.conftest import run_server

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook: nbformat.NotebookNode, address: str, folder: Path) -> None:
    """Replace the outputs of all cells by those of a run in this folder."""
    metadata = dict(notebook.metadata)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(folder)}}).execute(
        env={**os.environ, "GANSERVE_ADDRESS": address}
    )
    notebook.metadata = metadata  # without the version of Python
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when the cell ran
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)  # the same picture, twice as large


def main() -> None:
    notebook = read()
    with run_server() as running, tempfile.TemporaryDirectory() as folder:
        run(notebook, running.address, Path(folder))
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
