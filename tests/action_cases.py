"""Random elements and moved points, which the tests of actions share."""

from __future__ import annotations

import torch
from symmetry_cases import Case
from torch import Tensor

import metateleport as mt
from metateleport.point import Point

TASKS = 3


def elements(symmetry: mt.Symmetry, *batch: int, size: float = 1.0, seed: int = 0) -> Tensor:
    return symmetry.group.random(*batch, size=size, seed=seed, dtype=torch.float64)


def moved(case: Case, point: Point, size: float = 1.0, seed: int = 0) -> Point:
    """The point moved along all symmetries of a case, last layer first."""
    batch = () if point.loss is None else point.loss.shape
    for index, symmetry in enumerate(reversed(case.problem().symmetries)):
        point = symmetry.act(elements(symmetry, *batch, size=size, seed=10 * seed + index), point)
    return point
