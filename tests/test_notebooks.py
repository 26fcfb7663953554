"""The notebooks run from top to bottom, and are kept with their outputs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAID = {
    "lora": "by hand, less than 1e-8: True",
    "orbits": "drift",
    "quickstart": "stretch so far",
    "reading_an_attribution": "the teleport divides the loss",
    "reproduce_figure_6": "lr+tele",
    "your_own_family": "validation scores",
    "your_own_model": "is not made for this",
}
"""Something that each of them prints."""

SECONDS = {"orbits": 5}
"""How long they take where it is not about a minute."""


def printed(notebook: Any) -> str:
    """All that a notebook's outputs say, without line ends."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return " ".join(" ".join(output.get("text", "") for output in outputs).split())


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow(seconds=SECONDS.get(path.stem, 60)))
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the figure's results beside it, a small run takes their place.
    tiny = {"seeds": 2, "runs": 2, "stack": 2, "steps": 10, "hidden": 20, "tasks": 2, "evaluations": 14}
    monkeypatch.setenv("FIGURE_6", json.dumps(tiny))
    # Figures are shown in the notebook, not drawn beside it.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(path, as_version=4)
    kept = [len(cell.get("outputs", [])) for cell in notebook.cells]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert SAID[path.stem] in printed(notebook)
    # It says something wherever the kept one does.
    ran = [len(cell.get("outputs", [])) for cell in notebook.cells]
    assert all(ours or not theirs for ours, theirs in zip(ran, kept, strict=True))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert SAID[path.stem] in printed(notebook), f"run python -m tools.notebooks {path.stem}"
    text = path.read_text()
    assert len(text) < 600_000
    # Nobody's folders, no failed cell, no memory address.
    assert '"output_type": "error"' not in text
    assert not re.search(r"/(?:home|root|work|tmp)/", text)
    assert not re.search(r"0x[0-9a-f]{8}", text)
