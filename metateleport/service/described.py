"""Symmetries as requests describe them: a group and small matrices, without weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from metateleport.groups import Group
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.symmetries.base import Carried

__all__ = ["DescribedSymmetry", "effect_of", "nowhere"]

_WEIGHT, _MODULE = "weight", "module"


class DescribedSymmetry(Symmetry):
    """A symmetry of somebody else's model: what networks read of it is known, and it moves nothing here.

    Args:
        group: its group.
        matrices: its small matrices, `(*batch, size, size)`; for a group of vectors their diagonals, `(*batch, size)`.
        key: tells it from the others of a request.
        sees_rows: whether the inputs of its upper layer are known, whose number `nowhere` has.
    """

    kind = "described symmetry"
    exactness = "exact"

    def __init__(self, group: Group, matrices: Mapping[str, Tensor], key: str = "", sees_rows: bool = False) -> None:
        self.group = group
        self.parameters = (_WEIGHT,)
        self.modules = (_MODULE,) if sees_rows else ()
        self._matrices, self._key = dict(matrices), key

    @property
    def key(self) -> str:
        return self._key

    def matrices(self, point: Point, names: Collection[str] | None = None) -> dict[str, Tensor]:
        if len(self.group.shape) > 1:
            return dict(self._matrices)
        return {name: value.diag_embed() for name, value in self._matrices.items()}

    def diagonals(self, point: Point) -> dict[str, Tensor]:
        return dict(self._matrices) if len(self.group.shape) == 1 else super().diagonals(point)

    def act(self, element: Tensor, point: Point) -> Point:
        raise TypeError("the weights of a described symmetry are elsewhere: its owner moves them")

    def carry_covectors(self, element: Tensor, covectors: Mapping[str, Tensor], point: Point) -> Carried:
        raise TypeError("the covectors of a described symmetry are elsewhere")

    def carry_squares(self, element: Tensor, squares: Mapping[str, Tensor], point: Point) -> Carried:
        raise TypeError("the second moments of a described symmetry are elsewhere")


def nowhere(batch: tuple[int, ...], dtype: torch.dtype, rows: int | None = None) -> Point:
    """A point for described symmetries: it tells the batch, the dtype and the number of samples, and holds no data."""
    return Point(
        {_WEIGHT: torch.zeros(*batch, 1, dtype=dtype)},
        {_WEIGHT: torch.zeros(*batch, 1, dtype=dtype)},
        activations={} if rows is None else {_MODULE: torch.empty(*batch, rows, 0, dtype=dtype)},
        loss=torch.ones(batch, dtype=dtype),
    )


def effect_of(group: Group, element: Tensor, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""What an element does to the norms of the weights and of the gradients that it moves, from small matrices alone.

    With $g$ on the layer that puts the features out and $g^{-1}$ on the one that takes them in,

    $$|W|^2 = \operatorname{tr} C_V + \operatorname{tr} C_U \mapsto
      \operatorname{tr} g C_V g^\top + \operatorname{tr} g^{-\top} C_U g^{-1},$$

    and the covariances of the gradients, which are covectors, the other way round.

    Returns:
        `weight_norm` and `gradient_norm`: the factors that the norms change by, `(*batch,)`; only those whose matrices
        are known.

    Example:
        >>> from metateleport.groups import PositiveDiagonal
        >>> known = {"incoming_covariance": torch.tensor([1.0]), "outgoing_covariance": torch.tensor([16.0])}
        >>> effect_of(PositiveDiagonal(1), torch.tensor([2.0]), known)
        {'weight_norm': tensor(0.6860)}
    """
    found: dict[str, Tensor] = {}
    if group.name not in ("GL", "diagonal"):
        return found
    inverse = group.inverse(element)
    for name, (first, second) in _NORMS.items():
        if first in matrices and second in matrices:
            pair = matrices[first], matrices[second]
            before = _trace(group, pair[0], None) + _trace(group, pair[1], None)
            direct, dual = (element, inverse) if name == "weight_norm" else (inverse, element)
            transposed = dual if len(group.shape) == 1 else dual.mT
            own = direct if name == "weight_norm" or len(group.shape) == 1 else direct.mT
            other = transposed if name == "weight_norm" else dual
            after = _trace(group, pair[0], own) + _trace(group, pair[1], other)
            factor = torch.where(before > 0, (after / before).sqrt(), torch.ones_like(after))
            if bool(factor.isfinite().all()):
                found[name] = factor
    return found


_NORMS = {
    "weight_norm": ("incoming_covariance", "outgoing_covariance"),
    "gradient_norm": ("incoming_gradient_covariance", "outgoing_gradient_covariance"),
}


def _trace(group: Group, covariance: Tensor, by: Tensor | None) -> Tensor:
    """The trace of a covariance, moved by a matrix: $\\operatorname{tr} M C M^\\top$."""
    if len(group.shape) == 1:
        return (covariance if by is None else covariance * by.square()).sum(-1)
    moved = covariance if by is None else by @ covariance @ by.mT
    return torch.diagonal(moved, dim1=-2, dim2=-1).sum(-1)
