"""Families of the gallery at small settings, which the tests of tasks share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metateleport as mt

TASKS = Path(__file__).resolve().parents[1] / "tasks"


def label(value: object) -> str:
    if isinstance(value, Mapping):
        return "-".join(f"{name}={each}" for name, each in value.items()) or "defaults"
    return str(value)


def load(name: str, settings: Mapping[str, Any] | None = None) -> mt.TaskFamily:
    return mt.load_family(TASKS / f"{name}.py", settings)


def tensors(task: mt.Task) -> list[Tensor]:
    held_out = task.held_out or ((), ())
    sought = () if task.measure is None else task.measure.data
    own = task.training
    return [*task.model.state_dict().values(), *own[0], *own[1], *held_out[0], *held_out[1], *sought]


def fills(values: list[float], low: float, high: float) -> None:
    """The values lie in a range, and reach into its outer tenths."""
    tenth = (high - low) / 10
    assert low <= min(values) < low + tenth
    assert high - tenth < max(values) <= high


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    assert one.shape == other.shape
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
