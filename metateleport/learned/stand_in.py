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
_WANTED = 0.1
"""Share of the slope along a step that is to be left at its end."""

_LEAST = 0.05
"""Of a step that was shortened by more than this the gradients say nothing about the whole one."""

_SLOWER, _FASTER = 0.5, 2.0


@dataclasses.dataclass(frozen=True)
class StandIn:
    r"""What stands for the loss $L$ in a step length: Polyak's $L / |G|^2$, or a bound $|c|^2 / 2L$ on the curvature.

    All such lengths are proportional to it, so that it is a common factor on the steps, and the gradients tell whether
    that is too long or too short. With $\Delta$ the last step, $G$ the gradient before it and $G'$ the one after it,

    $$r = \langle G', \Delta \rangle / \langle G, \Delta \rangle$$

    is one for a step of no length, zero at the minimum along the step, and negative beyond it. The stand-in grows while
    $r$ is above a tenth and falls below it. As $\Delta$ was made without the data that $G'$ is of, no noise of
    theirs is correlated with it. It starts where Polyak's step is a fiftieth of the weights' norm. It goes with the
    scale of the gradients, and a loss that is scaled, with or without the gradients unscaled again, changes no step.

    Args:
        value: the stand-in, `(tasks,)`, positive.
        left: running mean of $r$, `(tasks,)`.
        slope: $\langle G, \Delta \rangle$ of the last step, `(tasks,)`.
        change: $\Delta$, by parameter name; empty before the first step.
        factor: what the caller has multiplied the last step by, which is not to be made up for.

    Example:
        >>> point = Point({"w": torch.ones(1, 4)}, {"w": torch.full((1, 4), 0.5)}, loss=torch.ones(1))
        >>> StandIn.begin(point).value
        tensor([0.0400])

    Source: the sign of $r$ is that of hypergradient descent, Baydin et al., ICLR 2018 (arXiv 1703.04782), equation 4.
    """

    value: Tensor
    left: Tensor
    slope: Tensor
    change: Tensors
    factor: float = 1.0

    @classmethod
    def begin(cls, point: Point) -> StandIn:
        """The stand-in at the first evaluation of some tasks."""
        assert point.loss is not None
        zero = torch.zeros_like(point.loss)
        weights, count, gradients = zero, 0, zero
        for name, gradient in point.gradients.items():
            weights = weights + point.parameters[name].detach().flatten(1).square().sum(1)
            gradients = gradients + gradient.detach().flatten(1).square().sum(1)
            count += gradient[0].numel()
        norm = weights.sqrt().clamp_min(_SMALLEST * count**0.5)
        value = (_FIRST * norm * gradients.sqrt()).clamp_min(torch.finfo(zero.dtype).tiny ** 0.5)
        return cls(value, torch.ones_like(zero), zero, {})

    def map(self, function: Callable[[Tensor], Tensor]) -> StandIn:
        """Applies `function` to every tensor."""
        change = {name: function(value) for name, value in self.change.items()}
        return StandIn(function(self.value), function(self.left), function(self.slope), change, self.factor)

    def seen(self, gradients: Tensors) -> StandIn:
        """The stand-in after an evaluation: what its gradients say of the last step."""
        if not self.change or not self.factor:
            return self
        after = _product(gradients, self.change, self.slope)
        # A step that led uphill is no step to learn from.
        downhill = self.slope < 0
        left = torch.where(downhill, after / torch.where(downhill, self.slope, 1.0), 1.0).clamp(-2.0, 1.0)
        left = torch.where(left.isfinite(), 1 - (1 - left) / max(self.factor, _LEAST), -2.0).clamp_min(-2.0)
        mean = _MEMORY * self.left + (1 - _MEMORY) * left
        factor = (2 * (mean - _WANTED)).exp().clamp(_SLOWER, _FASTER)
        return dataclasses.replace(self, value=torch.where(downhill, self.value * factor, self.value), left=mean)

    def stepped(self, before: Tensors, after: Tensors, gradients: Tensors) -> StandIn:
        """The stand-in with a step remembered, from the parameters `before` to those `after` it."""
        change = {name: (after[name] - before[name]).detach() for name in gradients}
        return dataclasses.replace(self, slope=_product(gradients, change, self.slope), change=change)


def _product(gradients: Tensors, change: Tensors, like: Tensor) -> Tensor:
    products = [
        (gradient.detach() * change[name]).flatten(1).sum(1) for name, gradient in gradients.items() if name in change
    ]
    return sum(products, torch.zeros_like(like))
