"""A stand-in for an unknown loss, for update rules that divide by the loss."""

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
"""Smallest root mean square of the weights that is reckoned with, so that a model that starts at zero moves."""

_MEMORY = 0.5
"""Memory of the running mean of the slope that is left, as one minibatch says little of it."""

_LEAST = 0.05
"""A step shortened by more than this factor says nothing about the whole step."""

_RATE = 0.4
"""Log of the largest growth from step to step; it may fall by twice as much."""


@dataclasses.dataclass(frozen=True)
class StandIn:
    r"""A stand-in for the loss $L$ in step lengths: in Polyak's $L / |G|^2$, or in a curvature bound $|c|^2 / 2L$.

    All such lengths are proportional to $L$, so the stand-in is a common factor on the steps. It is $\eta\,|G|^2$, with
    which Polyak's step is $\eta G$; gradients tell whether $\eta$ is too large or too small. With $\Delta$ the last
    step, $G$ the gradient before it and $G'$ the gradient after it, $-\langle G', \Delta \rangle$ is the slope that is
    left at the end of the step: positive if the step could have been longer, negative if it went too far. So

    $$\eta \mapsto \eta\, e^{0.4 \bar x}, \qquad \bar x \mapsto (\bar x + x) / 2, \qquad
      x = 2 \frac{-\langle G', \Delta \rangle}{|\langle G, \Delta \rangle| + |\langle G', \Delta \rangle|}.$$

    $\Delta$ was computed without the data of $G'$, so their noise is independent: in the steady state no slope is left
    on average, which is the best length at the given noise. At the start $\eta$ is such that Polyak's step is a
    fiftieth of the weights' norm. $\eta$ follows the scale of the gradients, so scaling the loss, with or without
    unscaling the gradients, changes no step.

    Args:
        length: $\eta$, `(tasks,)`, positive.
        left: $\bar x$, `(tasks,)`.
        slope: the slope of the loss at the start of the last step, along it, `(tasks,)`.
        change: $\Delta$, by parameter name; empty before the first step.
        factor: factor by which the caller has multiplied the last step on purpose, as a schedule does.

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
        """An empty stand-in, of length zero, for tasks of the shape of `like`."""
        zero = torch.zeros_like(like)
        return cls(zero, zero, zero, {})

    def value(self, gradients: Tensors) -> Tensor:
        """The stand-in for the loss at an evaluation with these gradients, `(tasks,)`, positive."""
        return (self.length * _squares(gradients, self.slope)).clamp_min(torch.finfo(self.slope.dtype).tiny)

    def map(self, function: Callable[[Tensor], Tensor]) -> StandIn:
        """Applies `function` to every tensor."""
        change = {name: function(value) for name, value in self.change.items()}
        return StandIn(function(self.length), function(self.left), function(self.slope), change, self.factor)

    def seen(self, gradients: Tensors) -> StandIn:
        """The stand-in after an evaluation, whose gradients tell whether the last step was too long."""
        if not self.change or not self.factor:
            return self
        after = -_product(gradients, self.change, self.slope)
        # The slope that would be left at the end of the whole step, if the loss were a parabola along it.
        whole = self.slope - (self.slope - after) / max(self.factor, _LEAST)
        # A step that started uphill says nothing; one that led to values that are not finite was too long.
        whole = torch.where(whole.isfinite(), whole, -self.slope.abs())
        size = self.slope.abs() + whole.abs()
        share = torch.where((self.slope > 0) & (size > 0), 2 * whole / torch.where(size > 0, size, 1.0), 0.0)
        left = _MEMORY * self.left + (1 - _MEMORY) * share
        return dataclasses.replace(self, length=self.length * (_RATE * left).exp(), left=left)

    def stepped(self, before: Tensors, after: Tensors, gradients: Tensors) -> StandIn:
        """The stand-in with the step from the parameters `before` to `after` noted."""
        change = {name: (after[name] - before[name]).detach() for name in gradients}
        return dataclasses.replace(self, slope=-_product(gradients, change, self.slope), change=change)


def _square(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten(1).square().sum(1)


def _squares(gradients: Tensors, like: Tensor) -> Tensor:
    """Squared norm of each task's gradient, with a positive lower bound, as it is a divisor."""
    total = sum((_square(value) for value in gradients.values()), torch.zeros_like(like))
    return total.clamp_min(torch.finfo(like.dtype).tiny ** 0.5)


def _product(gradients: Tensors, change: Tensors, like: Tensor) -> Tensor:
    products = [
        (gradient.detach() * change[name]).flatten(1).sum(1) for name, gradient in gradients.items() if name in change
    ]
    return sum(products, torch.zeros_like(like))
