"""A group that acts along axes of any number of parameters: the base of every symmetry that is found in a model."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from metateleport.groups import Group
from metateleport.point import Point
from metateleport.symmetries.base import Carried, Symmetry

__all__ = ["AxisSymmetry", "Leg", "fingerprint"]


@dataclasses.dataclass(frozen=True)
class Leg:
    r"""One place where a group element acts: $w \mapsto A w$ along an axis, with $A = g$ or $A = g^{-\top}$.

    Args:
        name: of the parameter or buffer, or of the module whose input or output it is.
        places: of a matrix group, `(repeats, k)`: where along the axis each coordinate stands. Of a diagonal group,
            a tensor that broadcasts to the parameter's shape: the coordinate that each entry is scaled by, -1 where
            it is not.
        axis: of a matrix group, the axis of the parameter.
        dual: whether $A = g^{-\top}$.
        variance: for the running variance of a BatchNorm, its epsilon: $v \mapsto d^2 (v + \epsilon) - \epsilon$.
    """

    name: str
    places: Tensor
    axis: int = 0
    dual: bool = False
    variance: float | None = None

    @functools.cached_property
    def run(self) -> int | None:
        """Where coordinates begin that stand one after the other in their own order, each once; None for all others."""
        places = self.places
        if places.ndim != 2 or places.shape[0] != 1 or not places.numel():
            return None
        start = int(places[0, 0])
        return start if bool((places[0] == torch.arange(start, start + places.shape[1])).all()) else None


def fingerprint(legs: Iterable[Leg]) -> str:
    """Eight digits that tell legs at other places apart, the same in every process.

    Example:
        >>> fingerprint([Leg("a", torch.arange(2))]) == fingerprint([Leg("a", torch.arange(2) + 1)])
        False
    """
    code = 0
    for leg in legs:
        code = zlib.crc32(repr((leg.name, leg.axis, leg.dual, tuple(leg.places.shape))).encode(), code)
        code = zlib.crc32(leg.places.to("cpu", torch.int64).contiguous().numpy().tobytes(), code)
    return f"{code:08x}"


class AxisSymmetry(Symmetry):
    r"""A group acting along axes of parameters: by $g$ on output axes, by $g^{-\top}$ on input axes.

    Between a layer $z = V h + b$ and a next layer $U z$ this is $(U, V, b) \mapsto
    (U g^{-1}, g V, g b)$; with several such layers, heads or groups all of them move together. Covectors go by
    $A^{-\top}$, so that gradients move as $G_U g^\top$ and $g^{-\top} G_V$.

    Args:
        group: the group.
        legs: where it acts on parameters and buffers, in the order of the data flow.
        inputs: modules whose input moves; `places` are along the features.
        outputs: modules whose output moves; `places` are along the features.
        exactness: `"exact"` or `"approximate"`.

    Example:
        >>> from metateleport.groups import PositiveDiagonal
        >>> whole = torch.arange(2)
        >>> legs = [Leg("0.weight", whole.reshape(2, 1)), Leg("1.weight", whole.reshape(1, 2), dual=True)]
        >>> AxisSymmetry(PositiveDiagonal(2), legs).parameters
        ('0.weight', '1.weight')
    """

    kind = "scaling"
    exactness = "exact"
    reads_place = False

    def __init__(
        self,
        group: Group,
        legs: Iterable[Leg],
        inputs: Iterable[Leg] = (),
        outputs: Iterable[Leg] = (),
        buffers: Iterable[str] = (),
        exactness: str = "exact",
    ) -> None:
        self.group = group
        self.legs = tuple(legs)
        self.buffers = tuple(buffers)
        names = dict.fromkeys(leg.name for leg in self.legs)
        self.parameters = tuple(name for name in names if name not in self.buffers)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.modules = tuple(dict.fromkeys(leg.name for leg in (*self.outputs, *self.inputs)))
        self.exactness = exactness

    @property
    def is_diagonal(self) -> bool:
        """Whether elements are vectors that scale entries, not matrices."""
        return len(self.group.shape) == 1

    @property
    def where(self) -> str:
        names = list(dict.fromkeys(leg.name for leg in self.legs))
        first = self.legs[0]
        if not self.is_diagonal:
            # Heads share their parameters, and differ in the rows of them that they move.
            names[0] += f"[{int(first.places.min())}:{int(first.places.max()) + 1}]"
        return ", ".join(names)

    @functools.cached_property
    def key(self) -> str:
        # Two may move the same parameters at other places: heads, slices, channels that are joined.
        return f"{super().key} {fingerprint(self.legs)}"

    def side(self, name: str) -> Literal["in", "out", "both"]:
        duals = {leg.dual for leg in self.legs if leg.name == name}
        return "both" if len(duals) > 1 else "in" if duals == {True} else "out"

    def act(self, element: Tensor, point: Point) -> Point:
        missing = [leg.name for leg in self.legs if leg.name not in point.parameters]
        if missing:
            raise KeyError(f"the point lacks {missing[0]!r}, which {self!r} moves; buffers belong among its parameters")
        inverse = self.group.inverse(element)
        direct, dual = self._pair(element, inverse)
        parameters = self._move(self.legs, direct, dual, point.parameters)
        gradients = self._move(self.legs, dual, direct, point.gradients)
        activations = self._move(self.inputs, direct, dual, point.activations)
        cotangents = self._move(self.outputs, dual, direct, point.cotangents)
        return point.update(parameters, gradients, activations, cotangents)

    def carry_covectors(self, element: Tensor, covectors: Mapping[str, Tensor], point: Point) -> Carried:
        direct, dual = self._pair(element, self.group.inverse(element))
        return Carried(self._move(self.legs, dual, direct, covectors), exact=self.exactness == "exact")

    def carry_vectors(self, element: Tensor, vectors: Mapping[str, Tensor], point: Point) -> dict[str, Tensor]:
        direct, dual = self._pair(element, self.group.inverse(element))
        return self._move(self.legs, direct, dual, vectors)

    def preconditioned(
        self, element: Tensor, inverse: Tensor, covectors: Mapping[str, Tensor], point: Point
    ) -> dict[str, Tensor]:
        direct, dual = self._pair(element, inverse)
        seen = self._move(self.legs, dual, direct, covectors)
        direct, dual = self._pair(inverse, element)
        return self._move(self.legs, direct, dual, seen)

    def carry_squares(self, element: Tensor, squares: Mapping[str, Tensor], point: Point) -> Carried:
        direct, dual = self._pair(element, self.group.inverse(element))
        return Carried(self._move(self.legs, dual.square(), direct.square(), squares), exact=self.is_diagonal)

    def overwrite(self, element: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Moves parameters and buffers in place, only where they change; for one element, without a graph."""
        direct, dual = self._pair(element, self.group.inverse(element))
        with torch.no_grad():
            for leg in self.legs:
                tensor, matrix = tensors[leg.name], dual if leg.dual else direct
                if self.is_diagonal:
                    factor = _factor(leg, matrix)
                    if leg.variance is None:
                        tensor.mul_(factor)
                    else:
                        tensor.add_(leg.variance).mul_(factor.square()).sub_(leg.variance)
                elif leg.axis in (0, tensor.ndim - 1) and leg.run is not None:
                    # In one stretch along the first or the last axis: a product as it stands, without a copy.
                    part = tensor.narrow(leg.axis, leg.run, leg.places.numel())
                    rows = part if part.ndim < 2 else part.flatten(1)
                    part.copy_(part @ matrix.mT if leg.axis else (matrix @ rows).reshape(part.shape))
                else:
                    places = leg.places.flatten().to(tensor.device)
                    tensor.index_copy_(leg.axis, places, _rotated(leg, matrix, tensor, 0).movedim(-1, leg.axis))

    def matrices(self, point: Point, names: Collection[str] | None = None) -> dict[str, Tensor]:
        if self.is_diagonal:
            return {name: value.diag_embed() for name, value in self.diagonals(point).items()}
        return self._forms(point, self._gram, names)

    def diagonals(self, point: Point) -> dict[str, Tensor]:
        return self._forms(point, self._sums) if self.is_diagonal else super().diagonals(point)

    def _forms(
        self, point: Point, form: Callable[..., Tensor], names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """What `form` makes of the two sides' weights, gradients and inputs, by name."""
        makers: dict[str, Callable[[], Tensor]] = {}
        axes: dict[str, set[tuple[int, ...]]] = {}
        for leg in self.legs:
            axes.setdefault(leg.name, set()).add(self._axes(leg))
        # The rows of what moves on both sides (a layer inside a residual stream) do not transform by one of them.
        usable = [leg for leg in self.legs if leg.name in self.parameters and len(axes[leg.name]) == 1]
        for name, dual in (("incoming", False), ("outgoing", True)):
            legs = [leg for leg in usable if leg.dual == dual]
            if not legs:
                continue
            makers[f"{name}_covariance"] = functools.partial(form, legs, point.parameters, point.parameters, point)
            if all(leg.name in point.gradients for leg in legs):
                gradients = point.gradients
                makers[f"{name}_gradient_covariance"] = functools.partial(form, legs, gradients, gradients, point)
                # Of the pair V and U these are G_V V^T and U^T G_U.
                first, second = (point.parameters, gradients) if dual else (gradients, point.parameters)
                makers[f"{name}_moment"] = functools.partial(form, legs, first, second, point)
        inputs = [leg for leg in self.inputs if leg.name in point.activations]
        if inputs:
            makers["feature_covariance"] = functools.partial(form, inputs, point.activations, point.activations, point)
        return {name: make() for name, make in makers.items() if names is None or name in names}

    def _axes(self, leg: Leg) -> tuple[int, ...]:
        if self.is_diagonal:
            return tuple(dim for dim, size in enumerate(leg.places.shape) if size > 1)
        return (leg.axis,)

    def _pair(self, element: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        return (element, inverse) if self.is_diagonal else (element, inverse.mT)

    def _move(
        self, legs: Iterable[Leg], direct: Tensor, dual: Tensor, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        moved: dict[str, Tensor] = {}
        for leg in legs:
            if leg.name not in tensors:
                continue
            tensor = moved.get(leg.name, tensors[leg.name])
            matrix = dual if leg.dual else direct
            if self.is_diagonal:
                moved[leg.name] = _scaled(leg, matrix, tensor)
                continue
            batch = matrix.ndim - 2
            axis = leg.axis + batch if leg.axis >= 0 else leg.axis
            rotated = _rotated(leg, matrix, tensor, batch)
            if rotated.shape[-1] == tensor.shape[axis] and leg.run == 0:
                moved[leg.name] = rotated.movedim(-1, axis)
            else:
                places = leg.places.flatten().to(tensor.device)
                moved[leg.name] = tensor.index_copy(axis, places, rotated.movedim(-1, axis))
        return moved

    def _gram(
        self, legs: Iterable[Leg], left: Mapping[str, Tensor], right: Mapping[str, Tensor], point: Point
    ) -> Tensor:
        """Sum over the legs of $A B^\\top$, their coordinates in rows: `(*batch, k, k)`."""
        batch = self._batch(point)
        grams = []
        for leg in legs:
            axis = leg.axis + batch if leg.axis >= 0 else leg.axis
            rows = [_gathered(leg, tensor, axis, batch) for tensor in (left[leg.name], right[leg.name])]
            grams.append(rows[0].mT @ rows[1])
        return functools.reduce(torch.add, grams)

    def _sums(
        self, legs: Iterable[Leg], left: Mapping[str, Tensor], right: Mapping[str, Tensor], point: Point
    ) -> Tensor:
        """The diagonal of what `_gram` is for a group of matrices: `(*batch, k)`."""
        batch = self._batch(point)
        sums = []
        for leg in legs:
            product = left[leg.name] * right[leg.name]
            behind = [1] * (product.ndim - batch - leg.places.ndim) + list(leg.places.shape)
            over = [batch + dim for dim, size in enumerate(behind) if size == 1]
            product = product.sum(over, keepdim=True) if over else product
            flat = product.flatten(batch)
            none = flat.new_zeros(*flat.shape[:-1], self.group.size + 1)
            places = leg.places.flatten().to(flat.device) % (self.group.size + 1)
            sums.append(none.index_add(-1, places, flat)[..., :-1])
        return functools.reduce(torch.add, sums)


def _gathered(leg: Leg, tensor: Tensor, axis: int, batch: int) -> Tensor:
    """The coordinates last, all else in rows, `(*batch, rows, k)`."""
    moved = tensor.movedim(axis, -1)
    if not (leg.places.numel() == moved.shape[-1] and leg.run == 0):
        moved = moved.index_select(-1, leg.places.flatten().to(tensor.device))
    return moved.reshape(*moved.shape[:batch], -1, leg.places.shape[1])


def _rotated(leg: Leg, matrix: Tensor, tensor: Tensor, batch: int) -> Tensor:
    """What stands at the leg's places after the matrix acted, its axis last."""
    axis = leg.axis + batch if leg.axis >= 0 else leg.axis
    rows = _gathered(leg, tensor, axis, batch) @ matrix.mT
    rest = [size for dim, size in enumerate(tensor.shape) if batch <= dim != axis % tensor.ndim]
    return rows.reshape(*rows.shape[:batch], *rest, leg.places.numel())


def _factor(leg: Leg, diagonal: Tensor) -> Tensor:
    ones = diagonal.new_ones(*diagonal.shape[:-1], 1)
    return torch.cat((diagonal, ones), -1)[..., leg.places.to(diagonal.device)]


def _scaled(leg: Leg, diagonal: Tensor, tensor: Tensor) -> Tensor:
    factor = _factor(leg, diagonal)
    batch = diagonal.shape[:-1]
    # What a module reads or outputs has samples in rows before its features.
    between = tensor.ndim - len(batch) - leg.places.ndim
    factor = factor.reshape(*batch, *(1,) * between, *leg.places.shape)
    if leg.variance is None:
        return tensor * factor
    return factor.square() * (tensor + leg.variance) - leg.variance
