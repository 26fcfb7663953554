"""What `conftest.py` promises the other tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOME_TESTS = """
import pytest

@pytest.mark.slow(seconds=50)
def test_first(): pass

@pytest.mark.slow
def test_stated_to_take_a_minute(): pass

@pytest.mark.slow(seconds=30)
def test_last(): pass

@pytest.mark.cuda
@pytest.mark.slow(seconds=1000)
def test_on_a_gpu(): pass
"""


def _outcomes(folder: Path, *options: str) -> dict[str, str]:
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "test_some.py").write_text(SOME_TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:xdist", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return dict(re.findall(r"::test_(\w+) (\w+)", done.stdout))


def test_slow_tests_run_as_long_as_their_seconds_fit(tmp_path: Path) -> None:
    outcomes = _outcomes(tmp_path, "--slow-seconds", "100")
    assert outcomes == {
        "first": "PASSED",
        "stated_to_take_a_minute": "SKIPPED",
        "last": "PASSED",
        "on_a_gpu": "SKIPPED",
    }


def test_without_a_bound_all_slow_tests_run(tmp_path: Path) -> None:
    outcomes = _outcomes(tmp_path)
    assert [name for name, outcome in outcomes.items() if outcome == "SKIPPED"] == ["on_a_gpu"]


@pytest.mark.parametrize("_time", range(2))
def test_every_test_draws_the_same(_time: int) -> None:
    drawn = torch.rand(1)
    assert drawn == torch.rand(1, generator=torch.Generator().manual_seed(0))


def test_nothing_lands_in_the_project() -> None:
    assert ROOT not in [Path.cwd(), *Path.cwd().parents]
    assert str(ROOT) not in os.environ["MLFLOW_TRACKING_URI"]
    assert torch.get_num_threads() == 1


def test_torchvision_imports() -> None:
    torchvision = pytest.importorskip("torchvision", exc_type=ModuleNotFoundError)
    assert torchvision.ops.nms
