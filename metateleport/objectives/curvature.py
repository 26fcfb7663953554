"""Curvature: how sharply the curves of an orbit bend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from metateleport.objectives.base import Objective
from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry

__all__ = ["Curvature", "curve_derivatives"]


class Curvature(Objective):
    r"""The mean curvature of random curves through a point that stay on its orbit.

    $$\psi(w) = \frac{1}{n} \sum_{i=1}^n \kappa_i, \qquad \gamma_i(t) = \exp(t M_i) \cdot w, \qquad
      \kappa_i = \frac{|\gamma_i' \wedge \gamma_i''|}{|\gamma_i'|^3} \text{ at } t = 0.$$

    $M_i$ holds one generator for each symmetry, drawn as a random direction of norm one; all symmetries move at once,
    in the order of a teleport. The derivatives are forward-mode, a `jvp` of a `jvp`. The curvature of a constant curve
    is zero.

    Args:
        symmetries: those to move along, in the order of the data flow.
        curves: $n$, how many curves.
        seed: seeds the generators, which are drawn anew at every call and shared by stacked tasks.

    Raises:
        ValueError: if there is no symmetry, or no curve.

    Example:
        >>> from metateleport.symmetries import QuadraticRotation
        >>> model = torch.nn.Module()
        >>> model.x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> circle = Point({"x": model.x.detach()}, activations={"": torch.eye(2)})
        >>> Curvature([QuadraticRotation(model)])(circle)
        tensor(0.2000)

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 4.2 and its appendix on the curvature of level sets.
    """

    reads_gradients = False

    def __init__(self, symmetries: Sequence[Symmetry], curves: int = 10, seed: int = 0) -> None:
        self.symmetries = tuple(symmetries)
        if not self.symmetries:
            raise ValueError("curvature needs symmetries to move along: there is none")
        if curves < 1:
            raise ValueError(f"curvature is a mean over at least one curve, not {curves!r}")
        self.curves, self.seed = curves, seed

    def evaluations(self, symmetry: Symmetry, point: Point) -> float:
        # Only batch pairs run a layer anew: with its tangents four times, and twice that again for the gradient.
        shares = sum(each.undo_cost(point, each.parameters) for each in self.symmetries)
        return 12 * self.curves * shares

    def __call__(self, point: Point) -> Tensor:
        source = torch.Generator().manual_seed(self.seed)
        like = point.parameters[self.symmetries[0].parameters[0]]
        total: Tensor | float = 0.0
        for _ in range(self.curves):
            generators = [
                each.group.random_generator(generator=source, dtype=like.dtype, device=like.device)
                for each in self.symmetries
            ]
            first, second = curve_derivatives(self.symmetries, generators, point)
            total = total + _curvature(first, second, 0 if point.loss is None else point.loss.ndim)
        return torch.as_tensor(total / self.curves)


def curve_derivatives(
    symmetries: Sequence[Symmetry], generators: Sequence[Tensor], point: Point
) -> tuple[Tensors, Tensors]:
    r"""First and second derivative at 0 of $t \mapsto \exp(t M) \cdot w$, for the parameters that move.

    Args:
        symmetries: in the order of the data flow; the last one acts first, as in a teleport.
        generators: one for each symmetry, `(*batch, *group.shape)` or without batch dimensions.
        point: $w$; its gradients are not looked at.

    Returns:
        Tensors shaped like the parameters, by name.

    Example:
        >>> from metateleport.symmetries import QuadraticRotation
        >>> model = torch.nn.Module()
        >>> model.x = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> circle = Point({"x": model.x.detach()}, activations={"": torch.eye(2)})
        >>> quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> first, second = curve_derivatives([QuadraticRotation(model)], [quarter], circle)
        >>> first["x"], second["x"].round()
        (tensor([0., 1.]), tensor([-1.,  0.]))
    """
    names = dict.fromkeys(name for each in symmetries for name in (*each.parameters, *each.buffers))
    like = point.parameters[next(iter(names))]
    start = point.replace(gradients={}, cotangents={}, pullback=None)
    batch = () if point.loss is None else point.loss.shape

    def curve(t: Tensor) -> Tensors:
        here = start
        for symmetry, generator in zip(reversed(symmetries), reversed(generators), strict=True):
            here = symmetry.act(symmetry.group.exp((t * generator).expand(*batch, *symmetry.group.shape)), here)
        return {name: here.parameters[name] for name in names}

    return _derivatives(curve, like.new_zeros(()))


def _derivatives(curve: Callable[[Tensor], Tensors], t: Tensor) -> tuple[Tensors, Tensors]:
    one = torch.ones_like(t)

    def velocity(time: Tensor) -> Tensors:
        tangents: Tensors = torch.func.jvp(curve, (time,), (one,))[1]
        return tangents

    found: tuple[Tensors, Tensors] = torch.func.jvp(velocity, (t,), (one,))  # type: ignore[assignment]
    return found


def _curvature(first: Mapping[str, Tensor], second: Mapping[str, Tensor], batch: int) -> Tensor:
    """|a ^ b| / |a|^3, computed as the length of the part of b orthogonal to a, over |a|^2."""

    def flat(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([value.reshape(*value.shape[:batch], -1) for value in tensors.values()], -1)

    a, b = flat(first), flat(second)
    squared = a.square().sum(-1, keepdim=True)
    still = squared == 0
    squared = torch.where(still, 1.0, squared)
    upright = b - a * ((a * b).sum(-1, keepdim=True) / squared)
    length = torch.linalg.vector_norm(upright, dim=-1)
    return torch.where(still.squeeze(-1), 0.0, length / squared.squeeze(-1))
