"""Convex quadratics, `1/2 x^T A x`: the known rotation symmetry and a condition number of one's choice."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from metateleport import Task, TaskFamily
from metateleport.families import FamilyError
from metateleport.symmetries import QuadraticRotation

# Beyond this the smallest eigenvalue drowns in the rounding of the others, and A is not surely positive any more.
LARGEST_CONDITION = 1e12


class QuadraticForm(nn.Module):
    """Holds x, takes A, gives `1/2 x^T A x`."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)

    def forward(self, matrix: Tensor) -> Tensor:
        return (self.x @ matrix @ self.x) / 2


def as_it_is(value: Tensor) -> Tensor:
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadratic(TaskFamily):
    """Convex quadratics with the minimum 0 at the origin, a random rotation and a random start each.

    Settings:
        dimension: length of x.
        condition: condition number of A. Its eigenvalues are log-spaced from 1 / condition to 1.
    """

    name: ClassVar[str] = "quadratic"
    dtype: ClassVar[torch.dtype] = torch.float64

    dimension: int = 10
    condition: float = 100.0

    def __post_init__(self) -> None:
        if self.dimension < 2:
            raise FamilyError(f"quadratic: a dimension of at least 2 leaves something to rotate, not {self.dimension}")
        if not 1 <= self.condition <= LARGEST_CONDITION:
            raise FamilyError(
                f"quadratic: condition has to lie between 1 and {LARGEST_CONDITION:g}, it is {self.condition}"
            )

    def sample(self, seed: int) -> Task:
        source = torch.Generator().manual_seed(seed)
        axes, upper = torch.linalg.qr(torch.randn(self.dimension, self.dimension, generator=source))
        # With the signs of the triangular factor moved over, the axes are spread evenly over all rotations.
        axes = axes * torch.diagonal(upper).sign()
        spectrum = self.condition ** torch.linspace(-1, 0, self.dimension)
        matrix = (axes * spectrum) @ axes.mT
        model = QuadraticForm(torch.randn(self.dimension, generator=source))
        return Task(
            model=model,
            loss=as_it_is,
            inputs=((matrix + matrix.mT) / 2,),
            targets=(),
            symmetries=[QuadraticRotation(model)],
            seed=seed,
        )
