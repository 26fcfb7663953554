"""The examples of CONTRIBUTING.md work: they are carried out on a copy of the project, which then runs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
CODE = r"[^`]*?:\n\n```(?:python)?\n(?P<code>.*?)^```$"
NEW = re.compile(r"^New file `(?P<path>[^`]+)`" + CODE, re.DOTALL | re.MULTILINE)
LINES = re.compile(r"`(?P<path>[^`\n]+)`, after\s`(?P<anchor>[^`\n]+)`" + CODE, re.DOTALL | re.MULTILINE)
COPIED = ("metateleport", "tasks", "tests", "benchmarks", "checkpoints")


def carry_out(page: str, root: Path) -> dict[str, list[str]]:
    """Writes the page's new files and its lines in other files; by kind of addition, which files were written."""
    written: dict[str, list[str]] = {}
    for section in page.split("\n### ")[1:]:
        paths = written.setdefault(section.partition("\n")[0], [])
        for match in NEW.finditer(section):
            path = root / match["path"]
            assert not path.exists(), path
            path.write_text(match["code"])
            paths.append(match["path"])
        for match in LINES.finditer(section):
            path, anchor = root / match["path"], match["anchor"] + "\n"
            before, found, after = path.read_text().partition(anchor)
            assert found, f"{path} has no line {anchor!r}"
            path.write_text(before + anchor + match["code"] + after)
            paths.append(match["path"])
    return written


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with everything that the page adds."""
    root = tmp_path_factory.mktemp("extended")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "pyproject.toml", root)
    carry_out(PAGE.read_text(), root)
    return root


def run(root: Path, *arguments: str) -> str:
    """What a Python process says that finds the copy's package."""
    environment = {**os.environ, "PYTHONPATH": str(root), "METATELEPORT_CACHE": str(root / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_an_addition_is_a_new_file_and_at_most_one_line_of_the_package(tmp_path: Path) -> None:
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    written = carry_out(PAGE.read_text(), tmp_path)
    assert {name.split()[-1] for name in written} == {"symmetry", "teleporter", "rule", "rival", "family"}
    for name, paths in written.items():
        new, *others = [path for path in paths if not path.startswith("tests/")]
        assert not (ROOT / new).exists()
        assert len(others) <= 1, name


def test_the_examples_are_in_the_project_s_style(extended: Path) -> None:
    run(extended, "-m", "ruff", "check", "--no-cache", ".")
    run(extended, "-m", "ruff", "format", "--no-cache", "--check", ".")


@pytest.mark.slow(seconds=15)
def test_the_symmetry_and_the_teleporter_pass_the_tests_of_all(extended: Path) -> None:
    """The new symmetry with every teleporter, the new teleporter with every kind of symmetry."""
    folders = ["symmetries", "teleporters/test_teleporters.py", "gauges", "objectives", "families/test_stack.py"]
    said = run(
        extended,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--slow-seconds",
        "0",
        "-k",
        "weight or minimum",
        *(f"tests/{each}" for each in folders),
    )
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None, said
    assert int(passed[1]) > 60


SCRIPT = """
import json
import torch
from torch import nn
import metateleport as mt
from metateleport import cli
from metateleport.detection.certificate import certify

torch.set_num_threads(1)
torch.manual_seed(0)
found = {}

model, x = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)), torch.randn(5, 3)
symmetry = mt.symmetries.WeightNormDirection(model, "0")
found["certificate"] = certify(model, [symmetry], (x,))[0].holds
try:
    mt.symmetries.WeightNormDirection(model, "1")
except mt.symmetries.Unsuitable as error:
    found["refusal"] = str(error)

report = mt.teleport(model, mt.teleporters.MinimumNormTeleporter(), x, symmetries=[symmetry])
found["moved"], found["drift"], found["decay"] = report.size, report.drift, report.weight_decay_change

small = ["--set", "width=3", "--tasks", "2", "--steps", "6", "--no-track", "--json", "a.json"]
found["evaluate"] = cli.main(["evaluate", "none", "leaky_mlp", *small, "--methods", "sign-sgd,gd"])
found["evaluate, misspelt"] = cli.main(["evaluate", "none", "leaky_mlp", *small, "--methods", "sign-sdg"])

two_steps = ["outer.meta_steps=2", "outer.tasks=2", "outer.unroll=2", "outer.horizon=4", "outer.starts=1"]
two_steps += ["validation.every=2", "validation.tasks=2"]
own = ["rule.kind=sign", "rule.lr=0.02", "family.width=3"]
found["train, rule"] = cli.main(["train", "leaky_mlp", "--no-track", "--out", "runs/sign", "--set", *own, *two_steps])
learned = mt.load_checkpoint("runs/sign").learned
found["rule"] = {"kind": learned.config.rule.kind, "lr": float(learned.rule.log_lr.exp())}
net = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 2))
start = net[0].weight.detach().clone()
optimizer = mt.LearnedOptimizer(net, "runs/sign")
net(x).square().mean().backward()
optimizer.step()
found["stepped"] = float((net[0].weight - start).norm())

found["train"] = cli.main(["train", "sine", "--no-track", "--out", "runs/sine", "--set", *two_steps])
found["training"] = mt.load_checkpoint("runs/sine").card["training"]["runs"]["learned"]

with open("found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def found(extended: Path) -> dict[str, Any]:
    """What came of using all that was added."""
    said = run(extended, "-c", SCRIPT)
    return {**json.loads((extended / "found.json").read_text()), "said": said}


def test_the_symmetry_is_certified(found: dict[str, Any]) -> None:
    assert found["certificate"] is True
    assert "weight_norm" in found["refusal"]


def test_the_teleporter_moves_and_reports_its_drift(found: dict[str, Any]) -> None:
    assert found["moved"] > 0
    assert found["drift"] < 1e-5
    assert found["decay"] < 0


def test_the_rule_is_trained_saved_loaded_and_steps(found: dict[str, Any]) -> None:
    assert found["train, rule"] == 0
    assert found["rule"]["kind"] == "sign"
    # Two meta-steps have moved it from where the recipe starts it.
    assert found["rule"]["lr"] != pytest.approx(0.02, rel=1e-4)
    assert found["rule"]["lr"] == pytest.approx(0.02, rel=0.1)
    assert found["stepped"] > 0


def test_the_rival_is_tuned_and_compared(extended: Path, found: dict[str, Any]) -> None:
    assert found["evaluate"] == 0
    methods = json.loads((extended / "a.json").read_text())["methods"]
    assert list(methods) == ["gd", "sign-sgd"]
    assert methods["sign-sgd"]["tuning"]["chosen"].keys() == {"lr"}
    assert methods["sign-sgd"]["median"][-1] < methods["sign-sgd"]["median"][0]
    assert found["evaluate, misspelt"] == 2
    assert "did you mean 'sign-sgd'?" in found["said"]


def test_the_family_is_trained_on(found: dict[str, Any]) -> None:
    assert found["train"] == 0
    assert found["training"]["meta_steps"] == 2
    assert math.isfinite(found["training"]["validation"])
