"""Rotations of a quadratic's level sets: x -> A^-1/2 R A^1/2 x."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from metateleport.groups import Orthogonal
from metateleport.point import Point
from metateleport.symmetries.base import Carried, Symmetry, Unsuitable

__all__ = ["QuadraticRotation"]


class QuadraticRotation(Symmetry):
    r"""$SO(n)$ on the level sets of $\tfrac12 x^\top A x$ with $A$ positive definite, exact.

    $$x \mapsto A^{-1/2} R A^{1/2} x, \qquad \nabla \mapsto A^{1/2} R A^{-1/2} \nabla.$$

    Args:
        model: a module that takes $A$, `(n, n)`, as its only input and holds $x$, `(n,)`; read, not kept.
        parameter: name of $x$ in the model.
        module: name of the module whose input is $A$; the model itself if not given.

    Raises:
        Unsuitable: if there is no such vector.

    Example:
        >>> model = nn.Module()
        >>> model.x = nn.Parameter(torch.ones(3))
        >>> QuadraticRotation(model, "x").group
        Orthogonal(3)

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), appendix; ICLR 2024 (arXiv 2305.13404), section 3.
    """

    kind = "quadratic rotation"
    exactness = "exact"

    def __init__(self, model: nn.Module, parameter: str = "x", module: str = "") -> None:
        named = dict(model.named_parameters())
        if parameter not in named or named[parameter].ndim != 1:
            raise Unsuitable(f"the model has no vector named {parameter!r}; its parameters are {', '.join(named)}")
        if not named[parameter].requires_grad:
            raise Unsuitable(f"{parameter!r} is frozen (requires_grad=False) and cannot be moved")
        self.parameter, self.module = parameter, module
        self.parameters = (parameter,)
        self.modules = (module,)
        self.group: Orthogonal = Orthogonal(named[parameter].shape[0])

    def act(self, element: Tensor, point: Point) -> Point:
        root, inverse_root = self._roots(point)
        parameters = {self.parameter: _times(inverse_root @ element @ root, point.parameters[self.parameter])}
        return point.update(parameters, self._apply(root @ element @ inverse_root, point.gradients))

    def carry_covectors(self, element: Tensor, covectors: Mapping[str, Tensor], point: Point) -> Carried:
        return Carried(self._apply(self._on_covectors(element, point), covectors), exact=True)

    def carry_squares(self, element: Tensor, squares: Mapping[str, Tensor], point: Point) -> Carried:
        return Carried(self._apply(self._on_covectors(element, point).square(), squares), exact=False)

    def matrices(self, point: Point, names: Collection[str] | None = None) -> dict[str, Tensor]:
        root, inverse_root = self._roots(point)
        matrix = point.activations[self.module]
        y = _times(root, point.parameters[self.parameter])
        found = {}
        for name, power in (
            ("ascent", matrix),
            ("second_ascent", matrix @ matrix),
            ("descent", inverse_root @ inverse_root),
        ):
            found[name] = _times(power, y).unsqueeze(-1) * y.unsqueeze(-2)
        return found

    def _apply(self, matrix: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.parameter: _times(matrix, tensors[self.parameter])} if self.parameter in tensors else {}

    def _on_covectors(self, element: Tensor, point: Point) -> Tensor:
        root, inverse_root = self._roots(point)
        return root @ element @ inverse_root

    def _roots(self, point: Point) -> tuple[Tensor, Tensor]:
        """The square root of A and its inverse."""
        values, vectors = torch.linalg.eigh(point.activations[self.module])
        roots = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt().unsqueeze(-2)
        return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
