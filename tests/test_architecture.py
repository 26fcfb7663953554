"""The rooms of the package: what they import is what `docs/architecture.md` says."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import metateleport as mt

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "metateleport"
FILES = sorted(PACKAGE.rglob("*.py"))

LIBRARIES = {
    "higher": "training/differentiable.py",
    "learn2learn": "fewshot/learn2learn.py",
    "mlflow": "tracking/",
}
"""Where the libraries are imported that only one place shall depend on."""


def rooms() -> list[str]:
    """The rooms in the order of the page, the lowest first."""
    listed = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    return [room for line in listed.strip().splitlines() for room in line.split("  ")[0].split()]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it, those of annotations too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


MODULES = {module_of(path): path for path in FILES}


def resolved(name: str) -> str | None:
    """The module of the package that a dotted name is of, or lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def test_the_page_names_every_room_and_no_other() -> None:
    there = {room_of(module) for module in MODULES} - {""}
    assert sorted(rooms()) == sorted(there)


@pytest.mark.parametrize("module", sorted(MODULES), ids=str)
def test_a_file_imports_rooms_above_its_own_only(module: str) -> None:
    order, own = rooms(), room_of(module)
    if not own:
        return
    for name in imported(MODULES[module]):
        target = resolved(name)
        if target is None:
            continue
        assert room_of(target), f"{module} imports the package itself"
        assert order.index(room_of(target)) <= order.index(own), f"{module} imports {target}, which is below it"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {
        module: {target for target in map(resolved, imported(path)) if target is not None and target != module}
        for module, path in MODULES.items()
    }
    # A package's face imports what it shows; its own files go past it.
    list(graphlib.TopologicalSorter(graph).static_order())


def test_no_private_file_lies_in_the_root() -> None:
    assert sorted(path.name for path in PACKAGE.glob("_*.py")) == ["__init__.py", "__main__.py"]


def imports(path: Path, library: str) -> bool:
    named = any(name.split(".")[0] == library for name in imported(path))
    return named or f'import_module("{library}")' in path.read_text()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_in_one_place(library: str) -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(name.split(".")[0] == library for name in imported(path))
        or f'import_module("{library}")' in path.read_text()
    }
    assert found
    assert all(each.startswith(LIBRARIES[library]) for each in found), found


def test_nothing_but_the_command_line_imports_what_tests_the_papers() -> None:
    users = {
        module
        for module, path in MODULES.items()
        if any(name.startswith("metateleport.papers") for name in imported(path))
    }
    assert {room_of(module) for module in users} <= {"papers", "cli"}


def test_few_names_stand_at_the_top() -> None:
    import metateleport

    assert len(metateleport.__all__) <= 25


def passed(function: Callable[[], Any]) -> set[str]:
    """Files of the package that a call runs code of."""
    found = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            found.add(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def steps_of(make: Callable[[nn.Module], torch.optim.Optimizer], count: int) -> list[set[str]]:
    """Files that each of some steps on two layers passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.LeakyReLU(0.1), nn.Linear(64, 3))
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    optimizer, found = make(model), []
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        found.append(passed(optimizer.step))
    return found


def section(title: str) -> str:
    return (ROOT / "docs" / "architecture.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def files_in(text: str) -> set[str]:
    return set(re.findall(r"`([a-z_0-9/]+\.py)`", text))


@pytest.mark.parametrize("way", ["The way of a step", "The way of a meta-step", "The way of an evaluation"])
def test_the_files_that_the_page_names_are_there(way: str) -> None:
    assert {name for name in files_in(section(way)) if not (PACKAGE / name).is_file()} == set()


def test_a_step_passes_the_files_that_the_page_names_and_few() -> None:
    learned = steps_of(lambda model: mt.LearnedOptimizer(model, "digits"), 30)
    shortest = min(learned, key=len)
    assert shortest == files_in(section("The way of a step").split("A step that looks at")[0])
    assert len(shortest) <= 8
    # Most steps are like that one; those that teleport pass twice as many.
    assert sum(each == shortest for each in learned) >= 15
    assert max(len(each) for each in learned[1:]) <= 18

    def wrapped(model: nn.Module) -> torch.optim.Optimizer:
        return mt.TeleportingOptimizer(torch.optim.AdamW(model.parameters()), model, mt.RandomTeleporter(), every=10)

    between = steps_of(wrapped, 3)[-1]
    assert between <= files_in(section("The way of a step"))
    assert len(between) <= 8
