"""Rescaling through a positively homogeneous activation: U D^-1, D V, D b."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from metateleport.groups import PositiveDiagonal
from metateleport.point import Point
from metateleport.symmetries.base import Carried, Kind, Pair

__all__ = ["Rescaling"]


class Rescaling(Pair):
    r"""Positive diagonal scaling of the units between two layers, exact.

    An activation with $s(dz) = d\,s(z)$ for $d > 0$ (ReLU, LeakyReLU, PReLU, identity) lets each hidden unit, or
    channel of a convolution, be scaled on its way in and unscaled on its way out, through pooling, dropout and
    flattening too:

    $$(U, V, b) \mapsto (U D^{-1},\ D V,\ D b), \qquad G_U \mapsto G_U D, \quad
      (G_V, G_b) \mapsto (D^{-1} G_V,\ D^{-1} G_b).$$

    Args:
        model: the module that holds both layers; it is read, not kept.
        first: name of the layer of $V$ and $b$, linear or convolution (not transposed, ungrouped second layer).
        second: name of the layer of $U$. A linear layer after a flattened convolution is understood: its inputs are
            taken as channel-major.
        frozen: whether parameters that are frozen (`requires_grad=False`) move too.

    Raises:
        Unsuitable: if the layers cannot form such a pair.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
        >>> Rescaling(model, "0", "2").dimension
        5

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), section 4.
    """

    kind = "rescaling"
    exactness = "exact"
    reads_place = False
    layer_types = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def __init__(self, model: nn.Module, first: str, second: str, frozen: bool = False) -> None:
        super().__init__(model, first, second, frozen)
        self.group: PositiveDiagonal = PositiveDiagonal(self.width)

    def act(self, element: Tensor, point: Point) -> Point:
        inverse = element.reciprocal()
        parameters = self._scale(element, inverse, point.parameters)
        activations, cotangents = {}, {}
        if self.second in point.activations:
            activations[self.second] = point.activations[self.second] * self._repeat(element).unsqueeze(-2)
        if self.first in point.cotangents:
            cotangents[self.first] = point.cotangents[self.first] * inverse.unsqueeze(-2)
        gradients = self._scale(inverse, element, point.gradients)
        return point.update(parameters, gradients, activations, cotangents)

    def carry_covectors(self, element: Tensor, covectors: Mapping[str, Tensor], point: Point) -> Carried:
        return Carried(self._scale(element.reciprocal(), element, covectors), exact=True)

    def carry_vectors(self, element: Tensor, vectors: Mapping[str, Tensor], point: Point) -> dict[str, Tensor]:
        return self._scale(element, element.reciprocal(), vectors)

    def carry_squares(self, element: Tensor, squares: Mapping[str, Tensor], point: Point) -> Carried:
        return Carried(self._scale(element.square().reciprocal(), element.square(), squares), exact=True)

    def multipliers(self, element: Tensor, kind: Kind) -> dict[str, Tensor]:
        powers = element.square() if kind == "squares" else element
        inverse = powers.reciprocal()
        sides = (powers, inverse) if kind == "vectors" else (inverse, powers)
        return {name: self._multiplier(name, *sides) for name in self.parameters}

    def _scale(self, into_first: Tensor, into_second: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scales the first layer's rows and bias by one diagonal, the second layer's columns by the other."""
        known = [name for name in self.parameters if name in tensors]
        return {name: tensors[name] * self._multiplier(name, into_first, into_second) for name in known}

    def _multiplier(self, name: str, into_first: Tensor, into_second: Tensor) -> Tensor:
        if name == self.second_weight:
            return _spread(self._repeat(into_second), self._second_ndim - 2).unsqueeze(-self._second_ndim)
        return _spread(into_first, self._first_ndim - 1) if name == self.first_weight else into_first

    def _repeat(self, diagonal: Tensor) -> Tensor:
        return diagonal.repeat_interleave(self._repeats, -1) if self._repeats > 1 else diagonal


def _spread(diagonal: Tensor, dimensions: int) -> Tensor:
    return diagonal.reshape(*diagonal.shape, *(1,) * dimensions)
