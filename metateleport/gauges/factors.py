"""The two sides of a GL(k) symmetry as matrices of k columns, whose product the symmetry leaves alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from metateleport.symmetries import LinearPair, Symmetry
from metateleport.symmetries.axes import AxisSymmetry, Leg

__all__ = ["Coordinates", "FactorPair", "FactorSide", "factor_pairs", "gathered", "spread"]

FactorSide = Literal["in", "out"]


@dataclasses.dataclass(frozen=True)
class Coordinates(Leg):
    """Where the coordinates of a matrix group stand in a tensor, as `Leg`; what is known of the places is kept."""

    @functools.cached_property
    def flat(self) -> Tensor:
        """The places, one after the other."""
        return self.places.flatten()

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether they are the first ones of the axis, each once, in their own order."""
        return self.places.shape[0] == 1 and bool((self.places[0] == torch.arange(self.places.shape[1])).all())

    def is_whole(self, tensor: Tensor, batch: int = 0) -> bool:
        """Whether they are all of a tensor's axis, in its own order."""
        return self.in_order and tensor.shape[self.axis + batch] == self.places.shape[1]


@dataclasses.dataclass(frozen=True)
class FactorPair:
    r"""The sides of a symmetry: $X_d$ of the tensors that put features out, $X_u$ of those that take them in.

    With the coordinates of the group along the columns, an element acts as

    $$X_d \mapsto X_d\, g^\top, \qquad X_u \mapsto X_u\, g^{-1}, \qquad X_u X_d^\top \mapsto X_u X_d^\top.$$

    Of a low-rank adapter $B A$ they are $X_d = A^\top$ and $X_u = B$; of a linear pair $X_d = [V\ b]^\top$ and
    $X_u = U$; of queries and keys $W_Q^\top$ and $W_K^\top$, their rows of one head.

    Args:
        symmetry: whose sides they are.
        size: $k$.
        outgoing: where the coordinates of $X_d$ stand.
        incoming: where those of $X_u$ stand.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        >>> (pair,) = factor_pairs([LinearPair(model, "0", "1")])
        >>> pair.names("out"), pair.names("in")
        (('0.weight', '0.bias'), ('1.weight',))
    """

    symmetry: Symmetry
    size: int
    outgoing: tuple[Coordinates, ...]
    incoming: tuple[Coordinates, ...]

    def legs(self, side: FactorSide) -> tuple[Coordinates, ...]:
        """The legs of one side: `out` for $X_d$, `in` for $X_u$."""
        return self.outgoing if side == "out" else self.incoming

    def names(self, side: FactorSide) -> tuple[str, ...]:
        """The parameters of one side."""
        return tuple(dict.fromkeys(leg.name for leg in self.legs(side)))


def factor_pairs(symmetries: Sequence[Symmetry]) -> tuple[FactorPair, ...]:
    """The pairs of factors whose tensors can be stepped in a gauge.

    Only exact symmetries of full matrix groups have them, and only where a tensor is moved on one side alone. A tensor
    that several of them would move along different axes, as in a chain of linear layers, goes with the first.

    Args:
        symmetries: of a model, in the order of the data flow.

    Returns:
        In the same order; heads of an attention are pairs of their own.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 4))
        >>> [pair.names("in") for pair in factor_pairs([LinearPair(model, "0", "1"), LinearPair(model, "1", "2")])]
        [('1.weight',)]
    """
    pairs: list[FactorPair] = []
    taken: dict[str, list[Leg]] = {}
    for symmetry in symmetries:
        pair = _pair(symmetry)
        if pair is None:
            continue
        legs = (*pair.outgoing, *pair.incoming)
        if any(_overlaps(leg, other) for leg in legs for other in taken.get(leg.name, ())):
            continue
        for leg in legs:
            taken.setdefault(leg.name, []).append(leg)
        pairs.append(pair)
    return tuple(pairs)


def _pair(symmetry: Symmetry) -> FactorPair | None:
    if symmetry.exactness != "exact" or symmetry.buffers or symmetry.group.name != "GL":
        return None
    size = symmetry.group.size
    if isinstance(symmetry, LinearPair):
        whole = torch.arange(size).reshape(1, size)
        first = [name for name in (symmetry.first_weight, symmetry.first_bias) if name is not None]
        return FactorPair(
            symmetry,
            size,
            tuple(Coordinates(name, whole) for name in first),
            (Coordinates(symmetry.second_weight, whole, 1, dual=True),),
        )
    if not isinstance(symmetry, AxisSymmetry) or symmetry.is_diagonal:
        return None
    legs = [Coordinates(leg.name, leg.places, leg.axis, leg.dual) for leg in symmetry.legs]
    outgoing, incoming = tuple(leg for leg in legs if not leg.dual), tuple(leg for leg in legs if leg.dual)
    if not outgoing or not incoming or {leg.name for leg in outgoing} & {leg.name for leg in incoming}:
        return None
    return FactorPair(symmetry, size, outgoing, incoming)


def _overlaps(leg: Leg, other: Leg) -> bool:
    """Whether two legs on one tensor share an entry; heads stand beside each other on one axis."""
    return leg.axis != other.axis or bool(torch.isin(leg.places, other.places).any())


def gathered(leg: Coordinates, tensor: Tensor) -> Tensor:
    """A tensor's entries at a leg's places as a matrix of k columns, `(tasks, rows, k)`.

    Args:
        leg: where the coordinates stand.
        tensor: a parameter or what is shaped like one, with the task dimension in front.

    Example:
        >>> gathered(Coordinates("w", torch.tensor([[1, 0]])), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[[3., 1.],
                 [4., 2.]]])
    """
    moved = tensor.movedim(leg.axis + 1, -1)
    if not leg.is_whole(tensor, batch=1):
        moved = moved.index_select(-1, leg.flat.to(tensor.device))
    return moved.reshape(tensor.shape[0], -1, leg.places.shape[1])


def spread(leg: Coordinates, rows: Tensor, tensor: Tensor) -> Tensor:
    """Undoes `gathered`: a tensor with the entries at a leg's places exchanged for those of a matrix.

    Args:
        leg: where the coordinates stand.
        rows: `(tasks, rows, k)`, as `gathered` gives them.
        tensor: the tensor whose other entries are kept, with the task dimension in front.

    Example:
        >>> leg, tensor = Coordinates("w", torch.tensor([[1, 0]])), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> bool((spread(leg, gathered(leg, tensor), tensor) == tensor).all())
        True
    """
    axis = leg.axis + 1
    rest = [size for dim, size in enumerate(tensor.shape) if 0 < dim != axis]
    found = rows.reshape(rows.shape[0], *rest, leg.places.numel())
    if leg.is_whole(tensor, batch=1):
        return found.movedim(-1, axis)
    return tensor.index_copy(axis, leg.flat.to(tensor.device), found.movedim(-1, axis))
