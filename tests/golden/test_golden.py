"""Golden trajectories: what shipped checkpoints do has not changed since it was recorded (`tests/golden/record.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden.record import ENTRIES, FOLDER, TOLERANCE, apart, trajectory, window
from torch import Tensor

from metateleport.checkpoint import shipped_checkpoints


def recorded(entry: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{entry}.json").read_text())


def check(entry: str, run: Callable[[str], dict[str, Tensor]]) -> None:
    kept, found = recorded(entry), run(entry)
    wanted, slack = kept[run.__name__], kept[f"{run.__name__} slack"]
    assert set(found) == set(wanted)
    for name, columns in wanted.items():
        for task, column in enumerate(columns):
            was = torch.tensor(column, dtype=torch.float64)
            first = torch.tensor(wanted["loss"][task][:1] if "loss" in wanted else [0.0], dtype=torch.float64)
            far = apart(name, was, found[name][: len(column), task], first)
            allowed = torch.tensor(slack[name][task] if name in slack else [0.0] * len(column), dtype=torch.float64)
            wrong = ~(far <= allowed.clamp_min(TOLERANCE))
            assert not bool(wrong.any()), f"{name} of task {task}, steps {wrong.nonzero().flatten().tolist()}: {far}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_steps_are_as_recorded(entry: str) -> None:
    check(entry, trajectory)


@pytest.mark.parametrize("entry", ENTRIES)
def test_windows_of_meta_training_are_as_recorded(entry: str) -> None:
    check(entry, window)


def test_every_shipped_checkpoint_is_recorded() -> None:
    assert {name for name, _ in ENTRIES.values()} == set(shipped_checkpoints())


@pytest.mark.parametrize("entry", ENTRIES)
def test_enough_is_recorded_to_be_worth_a_look(entry: str) -> None:
    assert min(recorded(entry)["steps"]) >= 5
    assert min(recorded(entry)["window_steps"]) >= 3
