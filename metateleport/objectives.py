"""What a teleport may seek on an orbit: a number at every point, differentiable in the group element."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from metateleport.point import Point
from metateleport.symmetries import Symmetry

__all__ = ["Objective", "SquaredGradientNorm"]


class Objective(abc.ABC):
    """A function of a point that a hand-designed teleporter raises or lowers along the orbit."""

    @abc.abstractmethod
    def evaluations(self, symmetry: Symmetry, point: Point) -> float:
        """Gradient evaluations that one value and its gradient in the group element cost."""

    @abc.abstractmethod
    def __call__(self, point: Point) -> Tensor:
        """The objective at a point, `(*batch,)`, differentiable in whatever moved the point there."""


class SquaredGradientNorm(Objective):
    r"""The squared norm of the gradient, $|\nabla L(g \cdot w)|^2$.

    The gradient at $g \cdot w$ is carried along from $w$: a covector under exact symmetries, the rebuilt part of the
    backward pass under batch forms. So following it along an orbit evaluates the loss only once.

    Example:
        >>> point = Point({"w": torch.zeros(2)}, gradients={"w": torch.tensor([3.0, 4.0])})
        >>> SquaredGradientNorm()(point)
        tensor(25.)

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), equation 5.
    """

    def evaluations(self, symmetry: Symmetry, point: Point) -> float:
        # Differentiating the rebuilt part of the backward pass costs twice the part itself.
        return 3 * symmetry.rebuild_cost(point)

    def __call__(self, point: Point) -> Tensor:
        if not point.gradients:
            raise ValueError("the squared gradient norm needs gradients: evaluate the point with a loss")
        return torch.as_tensor(point.squared_gradient_norm(frozenset(point.gradients) - point.stale))
