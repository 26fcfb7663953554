"""The Lie bracket of an infinitesimal symmetry and the gradient flow, on functions of a vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from metateleport.papers.experiments.descent import Function

__all__ = ["Action", "Bracket", "bracket", "gradient_flow"]

ACCURACY = 1e-4
"""How exactly the loss has to fall between two points of a flow."""
MOST_PIECES = 1 << 14

Action = Callable[[Tensor], Tensor]
"""Maps a vector `(n,)` to the velocities there of some symmetries, `(fields, n)`."""


@dataclasses.dataclass(frozen=True)
class Bracket:
    r"""The bracket $[A, R]L$ at a point for vector fields $A$ that leave $L$ alone, with $R = -\nabla L \cdot \nabla$.

    Args:
        value: $[A, R] L$, from the derivatives of both fields, `(fields,)`.
        by_norm: $-A |\nabla L|^2$, which it has to equal, `(fields,)`.
        slope: largest cosine of a field and $\nabla |\nabla L|^2$: zero where the point is critical on its orbit.
        drift: largest change of such a cosine while the gradient flow divides the loss by e: zero at a critical
            point if the flow stays critical, to first order.
    """

    value: Tensor
    by_norm: Tensor
    slope: float
    drift: float


def bracket(function: Function, action: Action, x: Tensor) -> Bracket:
    r"""Evaluates the condition of section 3.3 at a point.

    One teleport suffices if at every point where $[A, R]L = 0$ for all $A$ also $R([A, R]L) = 0$ for all $A$.

    Args:
        function: $L$; the minimum is taken to be zero.
        action: the fields $A$, tangent to the level sets.
        x: where.

    Example:
        >>> weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> rotate = lambda x: torch.stack([-weights[1] * x[1], weights[0] * x[0]]).unsqueeze(0)
        >>> found = bracket(lambda x: weights @ x.square() / 2, rotate, torch.tensor([0.0, 1.0], dtype=torch.float64))
        >>> found.slope, found.drift
        (0.0, 0.0)

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 3.3.
    """
    slope_of = torch.func.grad(function)

    def squared_norm(at: Tensor) -> Tensor:
        return slope_of(at).square().sum()

    def along_orbit(at: Tensor) -> Tensor:
        return action(at) @ torch.func.grad(squared_norm)(at)

    gradient, velocities = slope_of(x), action(x)
    hessian = torch.func.hessian(function)(x)
    turned = torch.func.jvp(action, (x,), (gradient,))[1]
    value = (turned - velocities @ hessian) @ gradient
    uphill = torch.func.grad(squared_norm)(x)
    scale = (velocities.norm(dim=1) * uphill.norm()).clamp_min(torch.finfo(x.dtype).tiny)
    # A field that stands still at x has no direction there.
    moving = velocities.norm(dim=1) > 1e-12 * velocities.norm().clamp_min(torch.finfo(x.dtype).tiny)
    changed = torch.func.jvp(along_orbit, (x,), (-gradient,))[1]
    pace = function(x) / gradient.square().sum()
    return Bracket(
        value=value,
        by_norm=-along_orbit(x),
        slope=float(((velocities @ uphill).abs() / scale)[moving].max()),
        drift=float((changed.abs() / scale * pace)[moving].max()),
    )


def gradient_flow(function: Function, x: Tensor, folds: float, steps: int) -> Tensor:
    r"""The gradient flow in the time in which the loss falls by a factor e, $x' = -L \nabla / |\nabla|^2$.

    Args:
        function: $L$, positive along the way.
        x: where to start, `(n,)`.
        folds: how many factors of e.
        steps: points of the path; between two of them stand as many Runge-Kutta steps (of fourth order) as it takes
            for the loss to fall as it has to.

    Returns:
        The path, `(steps + 1, n)`.

    Example:
        >>> path = gradient_flow(lambda x: x.square().sum(), torch.ones(2, dtype=torch.float64), 2.0, 50)
        >>> round(float(path[-1].square().sum() / 2), 6) == round(torch.e**-2, 6)
        True
    """

    def both(at: Tensor) -> tuple[Tensor, Tensor]:
        # A stiff function takes thousands of steps, and torch.func several times as long for each.
        leaf = at.detach().requires_grad_()
        value = function(leaf)
        return torch.autograd.grad(value, leaf)[0], value.detach()

    def velocity(at: Tensor) -> Tensor:
        gradient, value = both(at)
        return -gradient * value / gradient.square().sum()

    path, h = [x], folds / steps
    pieces = 1
    for _ in range(steps):
        level = function(path[-1]).log()
        pieces = max(pieces // 2, 1)
        while True:
            at = path[-1]
            for _ in range(pieces):
                at = _runge_kutta(velocity, at, h / pieces)
            off = abs(float(function(at).log() - level + h))
            if off <= ACCURACY * h or pieces >= MOST_PIECES:
                break
            pieces *= 2
        path.append(at)
    return torch.stack(path)


def _runge_kutta(velocity: Callable[[Tensor], Tensor], at: Tensor, h: float) -> Tensor:
    k1 = velocity(at)
    k2 = velocity(at + h / 2 * k1)
    k3 = velocity(at + h / 2 * k2)
    k4 = velocity(at + h * k3)
    return at + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
