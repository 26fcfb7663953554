"""Every example in a docstring runs and says what it claims."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import metateleport

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = sorted(path for path in (ROOT / "tasks").glob("*.py") if not path.name.startswith("_"))
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(metateleport.__path__, "metateleport.") if "__main__" not in info.name
)
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
