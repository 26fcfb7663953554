"""A stand-in for the loss, where a rule divides by it and nobody has told it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from metateleport.point import Point, Tensors

__all__ = ["StandIn"]

_FIRST = 0.02
"""Length of the first step, over the weights' norm, that Polyak's rule would take with the stand-in."""

_SMALLEST = 1e-2
"""Stands for the root mean square of weights that are smaller: a model that starts at zero has to move."""

_MEMORY = 0.5
"""Of the slope that is left at the end of a step: one minibatch tells little of it."""

_LEAST = 0.05
"""Of a step that was shortened by more than this the gradients say nothing about the whole one."""

_RATE = 0.4
"""Log of the largest factor that it grows by from step to step; it may fall by twice that."""


@dataclasses.dataclass(frozen=True)
class StandIn:
    r"""What stands for the loss $L$ in a step length: Polyak's $L / |G|^2$, or a bound $|c|^2 / 2L$ on the curvature.

    All such lengths are proportional to it, so that it is a common factor on the steps. It is $\eta\,|G|^2$, with which
    Polyak's step is $\eta G$, and the gradients tell whether $\eta$ is too long or too short. With $\Delta$ the last
    step, $G$ the gradient before it and $G'$ the one after it, $-\langle G', \Delta \rangle$ is the slope that is left
    at its end: positive where it might have been longer, negative where it went too far. So

    $$\eta \mapsto \eta\, e^{0.4 \bar x}, \qquad \bar x \mapsto (\bar x + x) / 2, \qquad
      x = 2 \frac{-\langle G', \Delta \rangle}{|\langle G, \Delta \rangle| + |\langle G', \Delta \rangle|}.$$

    As $\Delta$ was made without the data that $G'$ is of, noise in the two is independent: at rest no slope is left on
    average, and a step is as long as pays with the noise that there is. It starts where Polyak's step is a fiftieth of
    the weights' norm. It goes with the scale of the gradients, so that a loss which is scaled, with the gradients
    unscaled again or not, changes no step.

    Args:
        length: $\eta$, `(tasks,)`, positive.
        left: $\bar x$, `(tasks,)`.
        slope: the slope at the start of the last step, `(tasks,)`.
        change: $\Delta$, by parameter name; empty before the first step.
        factor: what the caller has multiplied the last step by, which is not to be made up for.

    Example:
        >>> point = Point({"w": torch.ones(1, 4)}, {"w": torch.full((1, 4), 0.5)}, loss=torch.ones(1))
        >>> StandIn.begin(point).value(point.gradients)
        tensor([0.0400])

    Source: the sign of $x$ is that of hypergradient descent, Baydin et al., ICLR 2018 (arXiv 1703.04782), equation 4.
    """

    length: Tensor
    left: Tensor
    slope: Tensor
    change: Tensors
    factor: float = 1.0

    @classmethod
    def begin(cls, point: Point) -> StandIn:
        """The stand-in at the first evaluation of some tasks."""
        assert point.loss is not None
        zero = torch.zeros_like(point.loss)
        weights = sum((_square(point.parameters[name]) for name in point.gradients), zero)
        count = sum(value[0].numel() for value in point.gradients.values())
        norm = weights.sqrt().clamp_min(_SMALLEST * count**0.5)
        return cls(_FIRST * norm / _squares(point.gradients, zero).sqrt(), zero, zero, {})

    @classmethod
    def none(cls, like: Tensor) -> StandIn:
        """One that stands for nothing yet, of length zero, for tasks of the shape of `like`."""
        zero = torch.zeros_like(like)
        return cls(zero, zero, zero, {})

    def value(self, gradients: Tensors) -> Tensor:
        """What stands for the loss at an evaluation with these gradients, `(tasks,)`, positive."""
        return (self.length * _squares(gradients, self.slope)).clamp_min(torch.finfo(self.slope.dtype).tiny)

    def map(self, function: Callable[[Tensor], Tensor]) -> StandIn:
        """Applies `function` to every tensor."""
        change = {name: function(value) for name, value in self.change.items()}
        return StandIn(function(self.length), function(self.left), function(self.slope), change, self.factor)

    def seen(self, gradients: Tensors) -> StandIn:
        """The stand-in after an evaluation: what its gradients say of the last step."""
        if not self.change or not self.factor:
            return self
        after = -_product(gradients, self.change, self.slope)
        # What would be left at the end of the whole step, were the loss a parabola along it.
        whole = self.slope - (self.slope - after) / max(self.factor, _LEAST)
        # A step that led uphill is no step to learn from, and one that left the finite was too long.
        whole = torch.where(whole.isfinite(), whole, -self.slope.abs())
        size = self.slope.abs() + whole.abs()
        share = torch.where((self.slope > 0) & (size > 0), 2 * whole / torch.where(size > 0, size, 1.0), 0.0)
        left = _MEMORY * self.left + (1 - _MEMORY) * share
        return dataclasses.replace(self, length=self.length * (_RATE * left).exp(), left=left)

    def stepped(self, before: Tensors, after: Tensors, gradients: Tensors) -> StandIn:
        """The stand-in with a step remembered, from the parameters `before` to those `after` it."""
        change = {name: (after[name] - before[name]).detach() for name in gradients}
        return dataclasses.replace(self, slope=-_product(gradients, change, self.slope), change=change)


def _square(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten(1).square().sum(1)


def _squares(gradients: Tensors, like: Tensor) -> Tensor:
    """Squared norm of the gradient of each task; never so small that nothing could be divided by it."""
    total = sum((_square(value) for value in gradients.values()), torch.zeros_like(like))
    return total.clamp_min(torch.finfo(like.dtype).tiny ** 0.5)


def _product(gradients: Tensors, change: Tensors, like: Tensor) -> Tensor:
    products = [
        (gradient.detach() * change[name]).flatten(1).sum(1) for name, gradient in gradients.items() if name in change
    ]
    return sum(products, torch.zeros_like(like))
