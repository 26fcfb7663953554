"""Two linear layers with nothing between them: U g^-1, g V, g b."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from metateleport.groups import GeneralLinear
from metateleport.point import Point
from metateleport.symmetries.base import Carried, Pair

__all__ = ["LinearPair"]


class LinearPair(Pair):
    r"""$GL(k)$ between two linear layers with no activation between them, exact.

    $$(U, V, b) \mapsto (U g^{-1},\ g V,\ g b), \qquad G_U \mapsto G_U g^\top, \quad
      (G_V, G_b) \mapsto (g^{-\top} G_V,\ g^{-\top} G_b).$$

    Args:
        model: the module that holds both layers; it is read, not kept.
        first: name of the layer of $V$ and $b$.
        second: name of the layer of $U$.
        frozen: whether parameters that are frozen (`requires_grad=False`) move too.

    Raises:
        Unsuitable: if the layers cannot form such a pair.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        >>> LinearPair(model, "0", "1").group
        GeneralLinear(2)

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 2.
    """

    kind = "linear pair"
    exactness = "exact"
    reads_place = False

    def __init__(self, model: nn.Module, first: str, second: str, frozen: bool = False) -> None:
        super().__init__(model, first, second, frozen)
        self.group: GeneralLinear = GeneralLinear(self.width)

    def act(self, element: Tensor, point: Point) -> Point:
        inverse = self.group.inverse(element)
        parameters = {
            self.first_weight: element @ point.parameters[self.first_weight],
            self.second_weight: point.parameters[self.second_weight] @ inverse,
        }
        if self.first_bias is not None:
            parameters[self.first_bias] = _times(element, point.parameters[self.first_bias])
        activations, cotangents = {}, {}
        if self.second in point.activations:
            activations[self.second] = point.activations[self.second] @ element.mT
        if self.first in point.cotangents:
            cotangents[self.first] = point.cotangents[self.first] @ inverse
        return point.update(parameters, self._carry(element, inverse, point.gradients), activations, cotangents)

    def carry_covectors(self, element: Tensor, covectors: Mapping[str, Tensor], point: Point) -> Carried:
        return Carried(self._carry(element, self.group.inverse(element), covectors), exact=True)

    def carry_vectors(self, element: Tensor, vectors: Mapping[str, Tensor], point: Point) -> dict[str, Tensor]:
        return self._carry(self.group.inverse(element).mT, element.mT, vectors)

    def preconditioned(
        self, element: Tensor, inverse: Tensor, covectors: Mapping[str, Tensor], point: Point
    ) -> dict[str, Tensor]:
        return self._carry(element.mT, inverse.mT, self._carry(element, inverse, covectors))

    def multiplied(self, square: Tensor, covectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""`preconditioned` for the tensors of one side, with the one matrix that it multiplies them with at hand.

        Args:
            square: symmetric; $g^\top g$ for $U$, its inverse for $V$ and $b$.
            covectors: by parameter name, a tensor shaped like the parameter.
        """
        return self._carry(square, square, covectors)

    def slopes(self, point: Point) -> Tensor | None:
        return None

    def _carry(self, element: Tensor, inverse: Tensor, covectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        carried = {}
        for name in self.parameters:
            if name not in covectors:
                continue
            if name == self.second_weight:
                carried[name] = covectors[name] @ element.mT
            elif name == self.first_weight:
                carried[name] = inverse.mT @ covectors[name]
            else:
                carried[name] = _times(inverse.mT, covectors[name])
        return carried

    def carry_squares(self, element: Tensor, squares: Mapping[str, Tensor], point: Point) -> Carried:
        # The mean of (sum_j g_ij p_j)^2 is sum_j g_ij^2 p_j^2 where the entries p_j are uncorrelated.
        inverse = self.group.inverse(element)
        return Carried(self._carry(element.square(), inverse.square(), squares), exact=False)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
