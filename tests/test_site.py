"""The site: formulas, pages from sources, links, tables from cards; and the whole of it, with warnings as errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_formulas_become_mathml() -> None:
    mathml = pytest.importorskip("tools.mathml", reason="latex2mathml is not installed")
    page = r'<p>with <span class="arithmatex">\(g \in \mathrm{GL}(k)\)</span> and</p>'
    page += '<div class="arithmatex">\n\\[\nG_V &lt; \\tfrac12\n\\]\n</div>'
    shown = mathml.formulas_as_mathml(page)
    assert shown.count("<math") == 2
    assert 'display="block"' in shown
    assert "arithmatex" not in shown
    assert "&amp;lt;" not in shown
    with pytest.raises(mathml.UnknownFormula, match="nowhere"):
        mathml.formulas_as_mathml(r'<span class="arithmatex">\(\nowhere{g}\)</span>')


def test_every_public_class_and_function_of_a_room_is_on_its_page() -> None:
    import metateleport
    from tools.pages import api

    pages = dict(api())
    for name in metateleport.__all__:
        value = getattr(metateleport, name)
        room = value.__module__.split(".")[1]
        assert f"::: metateleport.{room}.{name}\n" in pages[f"api/{room}.md"]
    assert "[`metateleport.optim`](optim.md)" in pages["api/index.md"]
    assert "api/cli.md" not in pages


def test_the_table_of_symmetries_has_every_kind_that_can_be_named() -> None:
    from tools.pages import symmetry_kinds

    page = symmetry_kinds()
    for name in ("LinearPair", "Rescaling", "BatchPair2022", "BatchPair2024", "LoRAPair", "AttentionQK", "GatedMLP"):
        assert f"[`{name}`](api/symmetries.md#metateleport.symmetries.{name})" in page
    # A row of a table is one line, and no formula ends a cell.
    rows = [line for line in page.splitlines() if line.startswith("| [")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


def test_recipes_are_those_of_the_shipped_checkpoints() -> None:
    from tools.pages import recipes

    page = recipes()
    for path in (ROOT / "checkpoints").glob("*/recipe.toml"):
        assert f"## {path.parent.name}\n" in page
        assert path.read_text().strip() in page


def test_a_notebook_is_a_page_with_its_outputs(tmp_path: Path) -> None:
    from tools.pages import notebook

    cells: list[dict[str, Any]] = [
        {"cell_type": "markdown", "source": ["# A title"]},
        {
            "cell_type": "code",
            "source": ["print(1)\n", "plot()"],
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
                {"output_type": "stream", "name": "stderr", "text": ["a warning\n"]},
                {"output_type": "display_data", "data": {"image/png": "aGVsbG8=", "text/plain": ["<Figure>"]}},
            ],
        },
    ]
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    text, pictures = notebook(path)
    assert text.startswith("# A title")
    assert "```python\nprint(1)\nplot()\n```" in text
    assert "```text\n1\n```" in text
    assert "a warning" not in text
    assert pictures == {"small-1-2.png": b"hello"}
    assert "![output](small-1-2.png)" in text


@pytest.mark.parametrize(
    ("here", "link", "there"),
    [
        ("contributing.md", "[a](docs/architecture.md#names)", "[a](architecture.md#names)"),
        ("contributing.md", "[a](tests/README.md)", "a (`tests/README.md`)"),
        ("figure_6.md", "[a](../notebooks/reproduce_figure_6.ipynb)", "[a](notebooks/reproduce_figure_6.md)"),
        ("results/digits.md", "[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("results/digits.md", "[a](README.md)", "[a](README.md)"),
        ("index.md", "[a](https://example.org)", "[a](https://example.org)"),
        ("notebooks/quickstart.md", "[a](../docs/choose.md)", "[a](../choose.md)"),
        # What is not there stays, for mkdocs to find.
        ("index.md", "[a](../nowhere.py)", "[a](../nowhere.py)"),
    ],
)
def test_links_lead_where_the_page_is(here: str, link: str, there: str) -> None:
    pytest.importorskip("latex2mathml")
    from tools import site

    page = SimpleNamespace(file=SimpleNamespace(src_uri=here))
    assert site.on_page_markdown(link, page, None, None) == there


@pytest.mark.parametrize("page", ["README.md", "docs/choose.md"])
def test_the_table_of_checkpoints_is_what_the_cards_say(page: str) -> None:
    from metateleport.checkpoint import load_checkpoint, shipped_checkpoints
    from tools import tables

    checkpoints = {name: load_checkpoint(name) for name in shipped_checkpoints()}
    text = (ROOT / page).read_text()
    rows = tables.choice(checkpoints, "results/" if page.startswith("docs") else "docs/results/")
    assert tables.written(text, rows) == text, "run python -m tools.tables"
    assert sum(f"`{name}`" in row for name in checkpoints for row in rows) == len(checkpoints)
    with pytest.raises(ValueError, match="once each"):
        tables.written("no marks", rows)


def test_the_family_of_the_page_is_trained_on_from_its_path(tmp_path: Path) -> None:
    """With the page's commands, shortened: the file need not be named as its class is, nor lie in the gallery."""
    from metateleport import cli, load_checkpoint

    page = (ROOT / "docs" / "own-family.md").read_text()
    (tmp_path / "waves.py").write_text(page.split("```python\n")[1].split("```")[0])
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("metateleport ")]
    trained, evaluated = commands[:2]
    assert trained[:2] == ["train", "waves.py"]
    short = ["meta_steps=2", "tasks=2", "unroll=2", "horizon=4", "starts=1"]
    short = [*(f"outer.{each}" for each in short), "validation.every=2", "validation.tasks=2"]
    assert cli.main([*trained, "--no-track", "--set", *short]) == 0
    assert load_checkpoint("runs/waves").card["family"]["name"] == "waves"
    small = ["--tasks", "2", "--steps", "3", "--methods", "learned", "--no-track"]
    assert cli.main([*evaluated, *small]) == 0
    assert json.loads((tmp_path / "waves.json").read_text())["task"]["name"] == "waves"


def test_the_figures_are_drawn_by_their_command(tmp_path: Path) -> None:
    from tools.figures import FIGURES, main

    assert main(["--out", str(tmp_path)]) == 0
    for name in FIGURES:
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000
        assert (ROOT / "docs" / "concepts" / f"{name}.png").is_file()


def test_what_the_figures_show_is_so() -> None:
    """Equal loss along the orbit, and a gradient that the symmetry carries to what it is there."""
    import torch

    import metateleport as mt
    from tools.figures import Product, _loss, _point

    model = Product(0.55, 0.55)
    pair, start = mt.LinearPair(model, "v", "u"), _point(model)
    for log_element in (-1.5, 0.75):
        moved = pair.act(torch.tensor([[log_element]]).exp(), start)
        there = Product(float(moved.parameters["u.weight"]), float(moved.parameters["v.weight"]))
        assert float(_loss(there).detach()) == pytest.approx(float(start.loss), rel=1e-5)
        if log_element == -1.5:
            lengths = [torch.cat([each.flatten() for each in at.gradients.values()]).norm() for at in (moved, start)]
            # docs/concepts.md says three times.
            assert float(lengths[0] / lengths[1]) == pytest.approx(3, abs=0.3)
        for name, gradient in _point(there).gradients.items():
            torch.testing.assert_close(moved.gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("broken", ["", "link", "formula"])
def test_the_site_is_built_and_what_is_broken_fails_it(broken: str, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    names = ["docs", "tools", "metateleport", "notebooks", "checkpoints", "tasks", "tests", "mkdocs.yml"]
    for name in [*names, *(path.name for path in ROOT.glob("*.md"))]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    extra = {"": "# Fine\n", "link": "[there](faq.md#nowhere)\n", "formula": "$\\nowhere$\n"}
    # A page that no line of mkdocs.yml names.
    (tmp_path / "docs" / "another.md").write_text(extra[broken])
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == (not broken), said
    if broken:
        assert "nowhere" in said
        return
    site = tmp_path / "runs" / "site"
    assert (site / "another.html").is_file()
    optim = (site / "api" / "optim.html").read_text()
    assert "LearnedOptimizer" in optim
    assert "<math" in optim
    assert "arithmatex" not in optim
