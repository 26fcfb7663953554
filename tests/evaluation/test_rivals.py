"""A rival is one new file and one line: shown on a copy of the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RIVAL = '''
"""Sign descent: every coordinate takes a step of the same length."""

import torch

from metateleport.evaluation.methods.first_order import FirstOrder
from metateleport.evaluation.rival import Lattice, Rival


class SignSGD(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.sign_()
        return super().step(closure)


RIVALS = (Rival("sign-sgd", lambda **settings: FirstOrder("sign-sgd", SignSGD, **settings), Lattice(-3, 0)),)
'''


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "metateleport", tmp_path / "metateleport", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    methods = tmp_path / "metateleport" / "evaluation" / "methods"
    (methods / "sign.py").write_text(RIVAL)
    registry = methods / "registry.py"
    registry.write_text(registry.read_text().replace('    "soap",\n', '    "soap",\n    "sign",\n'))
    return tmp_path


def test_a_rival_is_a_file_and_a_line(extended: Path) -> None:
    def evaluate(methods: str) -> subprocess.CompletedProcess[str]:
        small = ["leaky_mlp", "--set", "width=3", "--tasks", "2", "--steps", "6", "--no-track", "--jobs", "2"]
        command = [sys.executable, "-m", "metateleport.cli", "evaluate", "none", *small, "--methods", methods]
        environment = {**os.environ, "PYTHONPATH": str(extended), "METATELEPORT_CACHE": str(extended / "cache")}
        where = [*command, "--json", "a.json"]
        return subprocess.run(where, cwd=extended, env=environment, capture_output=True, text=True, check=False)

    done = evaluate("sign-sgd,gd")
    assert done.returncode == 0, done.stderr
    methods = json.loads((extended / "a.json").read_text())["methods"]
    assert list(methods) == ["gd", "sign-sgd"]
    assert methods["sign-sgd"]["tuning"]["chosen"].keys() == {"lr"}
    assert methods["sign-sgd"]["median"][-1] < methods["sign-sgd"]["median"][0]
    wrong = evaluate("sign-sdg")
    assert wrong.returncode == 2
    assert "did you mean 'sign-sgd'?" in wrong.stderr
