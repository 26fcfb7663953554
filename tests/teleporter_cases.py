"""One of every teleporter, by name, and what their tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.objectives import Curvature, Sharpness
from metateleport.teleporters import LevelSetTeleporter, NullSpaceTeleporter

Make = Callable[[Sequence[mt.Symmetry]], mt.Teleporter]
"""Makes a teleporter for the symmetries of a model."""

TELEPORTERS: dict[str, Make] = {
    "none": lambda _: mt.NoTeleport(),
    "random": lambda _: mt.RandomTeleporter(size=0.7, seed=0),
    "gradient-ascent": lambda _: mt.GradientAscentTeleporter(steps=4, step_size=0.02, cap=0.5),
    "gradient-descent": lambda _: mt.GradientAscentTeleporter(steps=4, step_size=0.02, cap=0.5, direction="descent"),
    "line search": lambda _: mt.GradientAscentTeleporter(steps=3, step_size=0.02, cap=0.5, line_search=True),
    "sharpness": lambda _: mt.GradientAscentTeleporter(
        Sharpness((0.1,), directions=2), steps=1, step_size=0.02, cap=0.5, direction="descent"
    ),
    "curvature": lambda symmetries: mt.GradientAscentTeleporter(
        Curvature(symmetries, curves=1), steps=1, step_size=0.005, cap=0.5
    ),
    "whitening": lambda _: mt.WhiteningTeleporter("features"),
    "whitening-outgoing": lambda _: mt.WhiteningTeleporter("outgoing"),
    "whitening-balanced": lambda _: mt.WhiteningTeleporter("balanced"),
    "null-space": lambda _: NullSpaceTeleporter(steps=3, step_size=0.02),
    "level-set": lambda _: LevelSetTeleporter(steps=3, step_size=0.02, projections=20, tolerance=1e-13),
}

TASKS = 3
"""How many tasks a stack has."""


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def untouched(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
