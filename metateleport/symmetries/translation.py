"""Translations of a bias that the next bias absorbs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from metateleport.groups import VectorGroup
from metateleport.point import Point
from metateleport.symmetries.axes import Leg, fingerprint
from metateleport.symmetries.base import Carried, Symmetry

__all__ = ["Absorber", "BiasTranslation", "Translation"]


class Translation(VectorGroup):
    r"""The additive group $\mathbb{R}^k$: elements are vectors, the exponential is the identity; dimension $k$.

    Example:
        >>> group = Translation(2)
        >>> group.compose(torch.ones(2), group.inverse(torch.ones(2)))
        tensor([0., 0.])
    """

    name = "translation"

    def exp(self, generator: Tensor) -> Tensor:
        return generator.clone()

    def inverse(self, element: Tensor) -> Tensor:
        return -element

    def compose(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right

    def identity(self, *batch: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        return torch.zeros(self.size, dtype=dtype, device=device).expand(*batch, self.size)

    def condition(self, element: Tensor) -> Tensor:
        return torch.where(element.isfinite().all(-1), 1.0, float("inf"))


@dataclasses.dataclass(frozen=True)
class Absorber:
    """An affine layer that reads the translated features.

    Args:
        weight: name of its weight.
        bias: name of its bias.
        places: `(repeats, k)`: where the features stand along the weight's axis.
        axis: that axis.
        out_axis: the axis along which the layer outputs.
    """

    weight: str
    bias: str
    places: Tensor
    axis: int
    out_axis: int


class BiasTranslation(Symmetry):
    r"""Translation of a bias that the next affine layer's bias absorbs, exact.

    $$b \mapsto b + t, \qquad c \mapsto c - W t, \qquad G_W \mapsto G_W + G_c t^\top,$$

    from a linear layer into the next, or from the values of an attention head into its output layer, since the
    weights of attention sum to one. The bias of the keys moves freely: it adds the same to all scores of a query.

    Args:
        bias: the bias that moves and its places in it, `(1, k)`.
        absorbers: the layers that undo it; none for keys.
        inputs: modules whose input moves.
    """

    kind = "translation"
    exactness = "exact"
    reads_place = False

    def __init__(self, bias: Leg, absorbers: Iterable[Absorber] = (), inputs: Iterable[Leg] = ()) -> None:
        self.bias, self.absorbers, self.inputs = bias, tuple(absorbers), tuple(inputs)
        self.group: Translation = Translation(bias.places.shape[1])
        absorbing = (name for each in self.absorbers for name in (each.weight, each.bias))
        self.parameters = tuple(dict.fromkeys((bias.name, *absorbing)))
        self.modules = tuple(dict.fromkeys(leg.name for leg in self.inputs))

    @property
    def where(self) -> str:
        places = self.bias.places
        names = list(self.parameters)
        names[0] += f"[{int(places.min())}:{int(places.max()) + 1}]"
        return ", ".join(names)

    @functools.cached_property
    def key(self) -> str:
        legs = [Leg(f"{each.weight} {each.bias}", each.places, each.axis) for each in self.absorbers]
        return f"{super().key} {fingerprint([self.bias, *legs])}"

    def act(self, element: Tensor, point: Point) -> Point:
        parameters = {self.bias.name: _added(self.bias, element, point.parameters[self.bias.name])}
        for each in self.absorbers:
            start = parameters.get(each.bias, point.parameters[each.bias])
            parameters[each.bias] = start - _shift(each, element, point.parameters[each.weight])
        activations = {
            leg.name: _added(leg, element.unsqueeze(-2), point.activations[leg.name])
            for leg in self.inputs
            if leg.name in point.activations
        }
        gradients = self.carry_covectors(element, point.gradients, point).tensors
        return point.update(parameters, gradients, activations)

    def carry_covectors(self, element: Tensor, covectors: Mapping[str, Tensor], point: Point) -> Carried:
        return Carried(self._carry(element, covectors), exact=True)

    def carry_squares(self, element: Tensor, squares: Mapping[str, Tensor], point: Point) -> Carried:
        # The mean of (p + q t)^2 is that of p^2 plus that of q^2 t^2 where p and q are uncorrelated.
        return Carried(self._carry(element.square(), squares), exact=False)

    def _carry(self, element: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        carried = {name: tensors[name] for name in self.parameters if name in tensors}
        for each in self.absorbers:
            if each.weight in carried and each.bias in tensors:
                carried[each.weight] = _outer_added(each, element, carried[each.weight], tensors[each.bias])
        return carried


def _added(leg: Leg, element: Tensor, tensor: Tensor) -> Tensor:
    places = leg.places.flatten().to(tensor.device)
    added = element.repeat(*(1,) * (element.ndim - 1), leg.places.shape[0])
    return tensor.index_add(-1, places, added.expand(*tensor.shape[:-1], -1))


def _shift(absorber: Absorber, element: Tensor, weight: Tensor) -> Tensor:
    """The change of the layer's outputs under a translation of its inputs, `(*batch, outputs)`."""
    batch = element.ndim - 1
    moved = weight.movedim((absorber.out_axis + batch, absorber.axis + batch), (batch, -1))
    chosen = moved.index_select(-1, absorber.places.flatten().to(weight.device))
    chosen = chosen.reshape(*chosen.shape[: batch + 1], -1, element.shape[-1])
    return (chosen.sum(-2) @ element.unsqueeze(-1)).squeeze(-1)


def _outer_added(absorber: Absorber, element: Tensor, gradient: Tensor, on_bias: Tensor) -> Tensor:
    """The gradient of a weight plus that of the bias times the translation."""
    batch = element.ndim - 1
    moved = gradient.movedim((absorber.out_axis + batch, absorber.axis + batch), (batch, -1))
    added = on_bias.unsqueeze(-1) * element.unsqueeze(-2)
    added = added.repeat(*(1,) * (added.ndim - 1), absorber.places.shape[0])
    added = added.reshape(*added.shape[: batch + 1], *(1,) * (moved.ndim - batch - 2), added.shape[-1])
    places = absorber.places.flatten().to(gradient.device)
    result = moved.index_add(-1, places, added.expand(*moved.shape[:-1], -1))
    return result.movedim((batch, -1), (absorber.out_axis + batch, absorber.axis + batch))
