"""Every example in a docstring runs and says what it claims; so does the code of the pages."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import metateleport
from metateleport.checkpoint import shipped_checkpoints

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = sorted(path for path in (ROOT / "tasks").glob("*.py") if not path.name.startswith("_"))
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(metateleport.__path__, "metateleport.") if "__main__" not in info.name
)
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("training-loops", "index", "concepts", "choose", "own-family")),
]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples(module: ModuleType) -> list[doctest.DocTest]:
    names = {**vars(module), "torch": torch, "nn": nn, "mt": metateleport}
    found = doctest.DocTestFinder(exclude_empty=True).find(module, globs=names)
    return [test for test in found if test.examples]


def failures(module: ModuleType) -> int:
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in examples(module):
        runner.run(test)
    return runner.failures


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["metateleport", *MODULES])
def test_examples_of_the_library(name: str) -> None:
    assert failures(importlib.import_module(name)) == 0


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_examples_of_the_gallery(path: Path) -> None:
    module = importlib.import_module(type(metateleport.load_family(path)).__module__)
    assert failures(module) == 0


def test_a_wrong_example_is_noticed() -> None:
    module = ModuleType("wrong")
    module.__doc__ = ">>> torch.ones(1).item()\n2.0\n"
    assert failures(module) == 1


@pytest.mark.parametrize("name", metateleport.__all__)
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert getattr(metateleport, name).__doc__


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_code_of_a_page_runs(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("name", shipped_checkpoints())
def test_the_page_tells_what_a_checkpoint_is_not_made_for(name: str) -> None:
    """Word for word, and no more reasons than there are."""
    rows = [line.split("|") for line in PAGES[1].read_text().splitlines() if line.startswith('| "')]
    told = {row[1].strip().strip('"') for row in rows if f"`{name}`" in row[2]}
    said: set[str] = set()
    relu = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    linear = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3))
    cases: list[tuple[nn.Module, dict[str, Any]]] = [(relu, {}), (linear, {}), (relu, {"symmetries": []})]
    for model, keywords in cases:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            metateleport.LearnedOptimizer(model, name, **keywords)
        for each in heard:
            _, not_made_for, reasons = str(each.message).partition(f"{name!r} is not made for this: ")
            if not not_made_for:
                continue
            reasons = reasons.removesuffix(". 'default' is made for any model, on minibatches")
            said |= set(re.split("; (?=it )", reasons))
    assert told == said
