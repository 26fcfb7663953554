"""The interface of every objective."""

from __future__ import annotations

import abc

from torch import Tensor

from metateleport.point import Point
from metateleport.symmetries import Symmetry

__all__ = ["Objective"]


class Objective(abc.ABC):
    """A function of a point that a hand-designed teleporter raises or lowers along the orbit.

    Example:
        >>> class WeightNorm(Objective):
        ...     reads_gradients = False
        ...
        ...     def evaluations(self, symmetry, point):
        ...         return 0.0
        ...
        ...     def __call__(self, point):
        ...         return point.parameters["w"].square().sum()
        >>> import torch
        >>> WeightNorm()(Point({"w": torch.tensor([3.0, 4.0])}))
        tensor(25.)
    """

    reads_gradients: bool = True
    """Whether it reads the point's gradients, which then are carried to every point that is tried."""
    reads_parameters: bool = True
    """Whether it reads anything else of the point; where it does not, weights need not be computed at every trial."""
    needs_loss: bool = False
    """Whether it evaluates the loss elsewhere: then the point has to have a `loss_at`."""

    @abc.abstractmethod
    def evaluations(self, symmetry: Symmetry, point: Point) -> float:
        """Gradient evaluations that one value and its gradient in the group element cost; a value alone, a third."""

    @abc.abstractmethod
    def __call__(self, point: Point) -> Tensor:
        """The objective at a point, `(*batch,)`, differentiable in whatever moved the point there."""
