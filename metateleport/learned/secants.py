"""Secant pairs: the curvature that past steps have measured, built around the learned step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metateleport.point import Tensors

__all__ = ["Secant", "secant_between", "with_secants"]

_SMALLEST_ANGLE = 1e-8


class Secant(NamedTuple):
    r"""A step $s$, the change $y$ of the gradient along it, and $1 / \langle s, y \rangle$.

    Args:
        step: by parameter name, `(tasks, ...)`.
        change: the same.
        weight: $1 / \langle s, y \rangle$, `(tasks,)`; zero where the pair is not used.
    """

    step: Tensors
    change: Tensors
    weight: Tensor


def secant_between(before: tuple[Tensors, Tensors], after: tuple[Tensors, Tensors], usable: Tensor) -> Secant:
    """The pair of two evaluations.

    Args:
        before: parameters and gradients, by name, `(tasks, ...)`.
        after: the same after the step.
        usable: where the step was taken and accepted, boolean `(tasks,)`.

    Returns:
        The pair; its weight is zero where it is not usable, or the gradient does not grow along the step.
    """
    step = {name: torch.where(_fit(usable, value), value - before[0][name], 0.0) for name, value in after[0].items()}
    change = {name: torch.where(_fit(usable, value), value - before[1][name], 0.0) for name, value in after[1].items()}
    product = _dot(step, change)
    sizes = (_dot(step, step) * _dot(change, change)).sqrt()
    bent = usable & product.isfinite() & (product > _SMALLEST_ANGLE * sizes)
    return Secant(step, change, torch.where(bent, torch.where(bent, product, 1.0).reciprocal(), 0.0))


def with_secants(secants: Sequence[Secant], direction: Tensors, inner: Callable[[Tensors], Tensors]) -> Tensors:
    r"""Limited-memory BFGS around a given first metric: `inner` takes the place of the scaled identity.

    Args:
        secants: the pairs, the oldest first.
        direction: gradients or their running mean, by name, `(tasks, ...)`.
        inner: the step of the first metric; linear, symmetric and positive.

    Returns:
        The step to subtract, by name.

    Example:
        >>> along = {"w": torch.tensor([[1.0, 0.0]])}
        >>> pair = Secant(along, {"w": torch.tensor([[4.0, 0.0]])}, torch.tensor([0.25]))
        >>> with_secants([pair], {"w": torch.tensor([[4.0, 1.0]])}, lambda value: value)["w"]
        tensor([[1., 1.]])

    Source: Nocedal, Mathematics of Computation 35, 1980, page 779.
    """
    shares = []
    for step, change, weight in reversed(secants):
        share = weight * _dot(step, direction)
        direction = {name: value - _fit(share, value) * change[name] for name, value in direction.items()}
        shares.append(share)
    direction = inner(direction)
    for (step, change, weight), share in zip(secants, reversed(shares), strict=True):
        rest = share - weight * _dot(change, direction)
        direction = {name: value + _fit(rest, value) * step[name] for name, value in direction.items()}
    return direction


def _dot(left: Tensors, right: Tensors) -> Tensor:
    return torch.stack([(value * right[name]).flatten(1).sum(-1) for name, value in left.items()]).sum(0)


def _fit(scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.reshape(*scale.shape, *(1,) * (tensor.ndim - scale.ndim))
