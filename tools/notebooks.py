"""Runs the notebooks from top to bottom and keeps their outputs.

python -m tools.notebooks                  all of them
python -m tools.notebooks quickstart       one
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from metateleport.files import write_text

__all__ = ["FOLDER", "main", "ran"]

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def ran(path: Path, folder: Path) -> nbformat.NotebookNode:
    """A notebook after a run in a folder; what a run leaves that differs from time to time is taken out."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            # Warnings of libraries, and memory addresses, are no results.
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs notebooks and writes them with their outputs."""
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="names without their suffix (default: all)")
    given = parser.parse_args(arguments)
    # The kernel finds this very project.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not given.names or path.stem in given.names:
            with tempfile.TemporaryDirectory() as folder:
                # What a notebook reads lies beside it; what it writes is not kept.
                for beside in FOLDER.glob("*.json"):
                    shutil.copy(beside, folder)
                write_text(path, nbformat.writes(ran(path, Path(folder))) + "\n")
            print(f"wrote {path}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
