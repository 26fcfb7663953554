"""The squared gradient norm: the rate at which gradient flow lowers the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from metateleport.objectives.base import Objective
from metateleport.point import Point
from metateleport.symmetries import Symmetry

__all__ = ["SquaredGradientNorm"]


class SquaredGradientNorm(Objective):
    r"""The squared norm of the gradient, $|\nabla L(g \cdot w)|^2$.

    The gradient at $g \cdot w$ is carried along from $w$: as a covector by exact symmetries, by rebuilding part of the
    backward pass by batch pairs. So an ascent along the orbit evaluates the loss only once.

    Example:
        >>> point = Point({"w": torch.zeros(2)}, gradients={"w": torch.tensor([3.0, 4.0])})
        >>> SquaredGradientNorm()(point)
        tensor(25.)

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), equation 5.
    """

    reads_parameters = False

    def evaluations(self, symmetry: Symmetry, point: Point) -> float:
        # Differentiating the rebuilt part of the backward pass costs twice the part itself.
        return 3 * symmetry.rebuild_cost(point)

    def __call__(self, point: Point) -> Tensor:
        if not point.gradients:
            raise ValueError("the squared gradient norm needs gradients: evaluate the point with a loss")
        return torch.as_tensor(point.squared_gradient_norm(frozenset(point.gradients) - point.stale))
