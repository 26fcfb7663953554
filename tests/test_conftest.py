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
@pytest.mark.parametrize("which", "ab")
def test_last(which): pass

@pytest.mark.cuda
@pytest.mark.slow(seconds=1000)
def test_on_a_gpu(): pass
"""
RUNS = {
    "all": [],
    "none": ["--slow-seconds", "0"],
    "turn 0": ["--slow-seconds", "100", "--slow-turn", "0"],
    "turn 1": ["--slow-seconds", "100", "--slow-turn", "1"],
    "turn 2": ["--slow-seconds", "100", "--slow-turn", "2"],
    "turn 3": ["--slow-seconds", "100", "--slow-turn", "3"],
    "today": ["--slow-seconds", "100"],
}


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Which of some tests pass, with the options of each run; the runs are one after the other in one process."""
    folder = tmp_path_factory.mktemp("some")
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "test_some.py").write_text(SOME_TESTS)
    code = f"""
import pytest
for name, options in {RUNS!r}.items():
    print("run", name)
    pytest.main(["-v", "-p", "no:xdist", "-p", "no:cacheprovider", *options])
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    runs = dict(re.findall(r"^run ([\w ]+)$(.*?)(?=^run |\Z)", done.stdout, re.DOTALL | re.MULTILINE))
    assert runs.keys() == RUNS.keys()
    return {name: re.findall(r"::test_(\S+) PASSED", said) for name, said in runs.items()}


@pytest.mark.slow(seconds=4)
def test_without_a_bound_all_slow_tests_run(passed: dict[str, list[str]]) -> None:
    assert passed["all"] == ["first", "stated_to_take_a_minute", "last[a]", "last[b]"]
    assert passed["none"] == []


@pytest.mark.slow(seconds=3)
def test_slow_tests_run_as_long_as_their_seconds_fit_and_take_turns(passed: dict[str, list[str]]) -> None:
    """One of each function before a second of any; on the next turn another function is the first."""
    assert passed["turn 0"] == ["first", "last[a]"]
    assert passed["turn 1"] == ["stated_to_take_a_minute", "last[a]"]
    assert passed["turn 2"] == ["first", "last[a]"]
    # Once round the functions, the other one of those that have several.
    assert passed["turn 3"] == ["first", "last[b]"]
    assert "first" in passed["today"] or "stated_to_take_a_minute" in passed["today"]


@pytest.mark.parametrize("_time", range(2))
def test_every_test_draws_the_same(_time: int) -> None:
    drawn = torch.rand(1)
    assert drawn == torch.rand(1, generator=torch.Generator().manual_seed(0))


def test_nothing_lands_in_the_project() -> None:
    assert ROOT not in [Path.cwd(), *Path.cwd().parents]
    assert str(ROOT) not in os.environ["MLFLOW_TRACKING_URI"]
    assert torch.get_num_threads() == 1
