"""A meta-training from recipe to checkpoint: modes, time, card, progress, devices, settings that cannot work."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import names, trainer
from training_cases import small as config

import metateleport as mt
from metateleport.families import FamilyError
from metateleport.learned import MetaOptimizer
from metateleport.settings import SettingsError
from metateleport.training import (
    Progression,
    TrainingError,
    device_for,
    train,
)


@pytest.mark.parametrize("mode", ["update", "update+tele", "tele"])
def test_every_mode_trains_and_loads(mode: str, tmp_path: Path) -> None:
    path = train(config(mode=mode, meta_steps=2), tmp_path / "a")
    loaded = mt.load_checkpoint(path)
    assert loaded.mode == mode
    assert (loaded.step_only is not None) == (mode == "update+tele")
    initial = MetaOptimizer(loaded.learned.config)
    assert initial.config.groups == ("GL",)


def test_training_leaves_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    train(config(meta_steps=1), tmp_path / "a")
    assert torch.equal(torch.rand(2), expected)


def test_a_run_may_be_limited_in_time(tmp_path: Path) -> None:
    path = train(config(meta_steps=100000, seconds=0.4), tmp_path / "a")
    runs = mt.load_checkpoint(path).card["training"]["runs"]
    assert set(runs) == {"learned", "step-only"}
    for run in runs.values():
        assert 0 < run["meta_steps"] < 1000


def test_what_the_card_says(tmp_path: Path) -> None:
    path = train(config(), tmp_path / "a", command="metateleport train leaky_mlp")
    card = mt.load_checkpoint(path).card
    assert card["mode"] == "lr+tele"
    assert card["family"]["name"] == "leaky_mlp"
    assert card["family"]["settings"]["width"] == 4
    assert card["training"]["command"] == "metateleport train leaky_mlp"
    assert card["training"]["recipe"]["outer"]["horizon"] == 6
    assert card["training"]["runs"]["learned"]["meta_steps"] == 6


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[str, int, float]] = []

    def report(name: str, progression: Progression, share: float) -> None:
        seen.append((name, progression.meta_step, share))

    train(config(meta_steps=3), tmp_path / "a", report=report)
    steps = [(1, 1 / 3), (2, 2 / 3), (3, 1.0)]
    assert seen == [(name, step, share) for name in ("learned", "step-only") for step, share in steps]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": 0}, "outer.tasks has to be at least 1"),
        ({"horizon": 2}, "outer.horizon = 2 is shorter than one window, outer.unroll = 3"),
        ({"lr": 0.0}, "outer.lr has to be a positive number, not 0.0"),
        ({"lr": math.nan}, "outer.lr has to be a positive number, not nan"),
        ({"seconds": 0}, "outer.seconds has to be a positive number, not 0.0"),
        ({"seed": -1}, "outer.seed has to be a whole number from 0 to"),
        ({"device": "tpu"}, "outer.device is one of auto, cpu, cuda; not 'tpu'"),
        ({"dtype": "float16"}, "outer.dtype is one of float32, float64; not 'float16'"),
        ({"base": "rmsprop", "mode": "tele"}, "rule.optimizer is one of sgd, momentum, adam; not 'rmsprop'"),
        ({"settings": {"width": 4, "activation": "tanh", "samples": 9}}, "names no symmetries"),
        ({"family": "nowhere"}, "no task family"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((TrainingError, SettingsError, FamilyError), match=words):
        train(config(**changes), tmp_path / "a")
    assert names(tmp_path) == []


def test_devices() -> None:
    assert device_for("auto").type in ("cpu", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="no CUDA device here"):
            device_for("cuda")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_of_the_tasks(dtype: str) -> None:
    learning = trainer(config(dtype=dtype, meta_steps=2))
    learning.run()
    assert learning.progression.skipped == 0
    assert dataclasses.asdict(learning.progression)["meta_step"] == 2
