"""Two layers with a nonlinear activation between them, invariant on one batch: the 2022 and the 2024 form."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.groups import GeneralLinear
from metateleport.point import Point
from metateleport.symmetries.activations import inverse_of, slope
from metateleport.symmetries.base import Carried, Pair, Unsuitable

__all__ = ["BatchPair2022", "BatchPair2024"]


class _BatchPair(Pair):
    exactness = "batch-exact"

    def __init__(self, model: nn.Module, first: str, second: str, activation: nn.Module) -> None:
        super().__init__(model, first, second)
        self.group: GeneralLinear = GeneralLinear(self.width)
        if not isinstance(activation, nn.Module):
            raise Unsuitable(f"the activation is given as a module such as nn.LeakyReLU(0.1), not {activation!r}")
        if any(True for _ in activation.parameters()):
            raise Unsuitable(f"{activation} has parameters of its own; the batch forms take fixed activations")
        # A copy that overwrites nothing: pre-activations are read again after it.
        copied: Any = copy.deepcopy(activation)
        if hasattr(copied, "inplace"):
            copied.inplace = False
        self.activation: nn.Module = copied

    def holds(self, point: Point, element: Tensor | None = None) -> Tensor:
        return _has_full_rank(self._solved_for(point, element))

    @abc.abstractmethod
    def _solved_for(self, point: Point, element: Tensor | None) -> Tensor:
        """The rows whose full rank the form needs, `(*batch, samples, features)`."""

    @abc.abstractmethod
    def _carry(self, element: Tensor, inverse: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Covectors of the layer that moves linearly, carried by the element; those of the other as they are."""

    def carry_covectors(self, element: Tensor, covectors: Mapping[str, Tensor], point: Point) -> Carried:
        return Carried(self._carry(element, self.group.inverse(element), covectors), exact=False)

    def carry_vectors(self, element: Tensor, vectors: Mapping[str, Tensor], point: Point) -> dict[str, Tensor]:
        raise Unsuitable(f"a {self.kind} does not act linearly, so steps are not carried along it")

    def carry_squares(self, element: Tensor, squares: Mapping[str, Tensor], point: Point) -> Carried:
        inverse = self.group.inverse(element)
        return Carried(self._carry(element.square(), inverse.square(), squares), exact=False)

    def _before(self, point: Point) -> Tensor:
        """Pre-activations of the first layer, `(*batch, samples, width)`."""
        z = point.activations[self.first] @ point.parameters[self.first_weight].mT
        return z if self.first_bias is None else z + point.parameters[self.first_bias].unsqueeze(-2)

    def _rebuild(self, point: Point, parameters: dict[str, Tensor], before: Tensor, features: Tensor) -> Point:
        """The point at `parameters`, with the part of the backward pass below U's output made anew.

        The outputs of U are unchanged, so the cotangent on them is known and nothing above has to be seen again.
        """
        activations = {self.second: features}
        if self.second not in point.cotangents:
            stale = point.stale | point.gradients.keys()
            return point.update(parameters, activations=activations, stale=frozenset(stale))
        above = point.cotangents[self.second]
        if self.first not in point.cotangents:
            # The point has let go of everything below U: only U's gradient is made.
            stale = (point.stale | point.gradients.keys()) - {self.second_weight}
            gradients = {self.second_weight: above.mT @ features}
            return point.update(parameters, gradients, {self.second: features}, stale=frozenset(stale))
        below = (above @ parameters[self.second_weight]) * slope(self.activation, before)
        gradients = {
            self.second_weight: above.mT @ features,
            self.first_weight: below.mT @ point.activations[self.first],
        }
        if self.first_bias is not None:
            gradients[self.first_bias] = below.sum(-2)
        cotangents = {self.first: below}
        others = point.gradients.keys() - gradients.keys()
        stale = point.stale - gradients.keys()
        if point.pullback is not None:
            lower, lower_cotangents = point.pullback(self.first, below @ parameters[self.first_weight])
            gradients.update(lower)
            cotangents.update(lower_cotangents)
        else:
            stale = stale | others
        return point.update(parameters, gradients, activations, cotangents, frozenset(stale))

    def rebuild_cost(self, point: Point) -> float:
        """Share of a gradient evaluation: a layer costs three products, the rebuilt part counts those it makes anew.

        Of U's layer the product that sends the cotangent down, of V's layer the weight gradient, of every layer
        below both and the product that leads to it. Layers whose cotangents the point has let go of are left out.
        """
        if self.first not in point.cotangents:
            return 0.0
        sizes = {name: _products(point, name) for name in point.activations}
        total = 3 * sum(sizes.values())
        order = list(point.activations)
        below = order[: order.index(self.first)] if self.first in order else []
        below = [name for name in below if name in point.cotangents]
        rebuilt = sizes[self.second] + sizes[self.first] + sum(2 * sizes[name] for name in below)
        if below:
            rebuilt += sizes[self.first] - sizes[below[0]]
        return rebuilt / total

    def undo_cost(self, point: Point, changed: Sequence[str]) -> float:
        if not {self.first_weight, self.first_bias} & set(changed):
            return 0.0
        # V's layer runs once more on the batch: one product of its three.
        return _products(point, self.first) / (3 * sum(_products(point, name) for name in point.activations))


def _products(point: Point, module: str) -> float:
    """Multiplications of one matrix product of a layer; zero where it has no weight of its own."""
    weight = point.parameters.get(f"{module}.weight")
    batch = 0 if point.loss is None else point.loss.ndim
    return 0.0 if weight is None else float(weight.shape[batch:].numel() * point.activations[module].shape[-2])


class BatchPair2022(_BatchPair):
    r"""$GL(k)$ through a bijective activation, exact on the batch: the 2022 form.

    $$V \mapsto V + \left(s^{-1}(g\, s(Vh + b)) - b - Vh\right) h^+, \qquad U \mapsto U g^{-1},$$

    with $h$ the inputs of $V$ in columns. It holds if $h$ has full column rank, so for at most as many samples as
    $V$ has inputs. Written as a difference, so that $g = 1$ leaves the weights alone. It has the group law on its
    batch.

    Args:
        model: the module that holds both layers; it is read, not kept.
        first: name of the layer of $V$ and $b$.
        second: name of the layer of $U$.
        activation: the activation between them, bijective on the real line (LeakyReLU).

    Raises:
        Unsuitable: if the layers cannot form such a pair, or the activation has no inverse on the whole line.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 5), nn.LeakyReLU(0.1), nn.Linear(5, 1))
        >>> BatchPair2022(model, "0", "2", model[1]).exactness
        'batch-exact'

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), section 4.2.
    """

    kind = "batch pair, 2022 form"

    def __init__(self, model: nn.Module, first: str, second: str, activation: nn.Module) -> None:
        super().__init__(model, first, second, activation)
        inverse = inverse_of(activation)
        if inverse is None:
            raise Unsuitable(f"{activation} has no known inverse on the whole line; the 2024 form does not need one")
        self._inverse = inverse

    def _solved_for(self, point: Point, element: Tensor | None) -> Tensor:
        return point.activations[self.first]

    def act(self, element: Tensor, point: Point) -> Point:
        before = self._before(point)
        features = self.activation(before) @ element.mT
        moved = self._inverse(features)
        shift = _least_norm(point.activations[self.first], moved - before)
        parameters = {
            self.first_weight: point.parameters[self.first_weight] + shift.mT,
            self.second_weight: point.parameters[self.second_weight] @ self.group.inverse(element),
        }
        return self._rebuild(point, parameters, moved, features)

    def _carry(self, element: Tensor, inverse: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # U moves linearly; what stands for V and b has no image under a linear map and stays.
        carried = {name: tensors[name] for name in self.parameters if name in tensors}
        if self.second_weight in carried:
            carried[self.second_weight] = carried[self.second_weight] @ element.mT
        return carried


class BatchPair2024(_BatchPair):
    r"""$GL(k)$ through any activation, exact on the batch: the 2024 form.

    $$V \mapsto gV, \quad b \mapsto gb, \qquad U \mapsto U + U (H - H') H'^+, \qquad
      H = s(Vh + b),\ H' = s(gVh + gb).$$

    It holds if $H'$ has full column rank, so for at most as many samples as there are units. Written as a
    difference, so that $g = 1$ leaves the weights alone. It has the group law only where samples equal the width.

    Args:
        model: the module that holds both layers; it is read, not kept.
        first: name of the layer of $V$ and $b$.
        second: name of the layer of $U$.
        activation: the elementwise activation between them.

    Raises:
        Unsuitable: if the layers cannot form such a pair.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> BatchPair2024(model, "0", "2", model[1]).dimension
        64

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 2 and appendix A.
    """

    kind = "batch pair, 2024 form"

    def matrices(self, point: Point) -> dict[str, Tensor]:
        before = self._before(point) if self.first in point.activations else None
        found = super().matrices(point)
        return found if before is None else {**found, "preactivation_covariance": before.mT @ before}

    def _solved_for(self, point: Point, element: Tensor | None) -> Tensor:
        before = self._before(point)
        return self.activation(before if element is None else before @ element.mT)

    def act(self, element: Tensor, point: Point) -> Point:
        before = self._before(point)
        moved = before @ element.mT
        features, old = self.activation(moved), self.activation(before)
        second = point.parameters[self.second_weight]
        shift = _least_norm(features, (old - features) @ second.mT)
        parameters = {
            self.first_weight: element @ point.parameters[self.first_weight],
            self.second_weight: second + shift.mT,
        }
        if self.first_bias is not None:
            bias = point.parameters[self.first_bias]
            parameters[self.first_bias] = (element @ bias.unsqueeze(-1)).squeeze(-1)
        return self._rebuild(point, parameters, moved, features)

    def _carry(self, element: Tensor, inverse: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # V and b move linearly; what stands for U has no image under a linear map and stays.
        carried = {name: tensors[name] for name in self.parameters if name in tensors}
        if self.first_weight in carried:
            carried[self.first_weight] = inverse.mT @ carried[self.first_weight]
        if self.first_bias is not None and self.first_bias in carried:
            carried[self.first_bias] = (inverse.mT @ carried[self.first_bias].unsqueeze(-1)).squeeze(-1)
        return carried


def _has_full_rank(rows: Tensor) -> Tensor:
    """Whether there are at most as many rows as columns and all of them independent, `(*batch,)`."""
    if rows.shape[-2] > rows.shape[-1]:
        return torch.zeros(rows.shape[:-2], dtype=torch.bool, device=rows.device)
    # The singular value decomposition raises on what is not finite, and spoils the whole batch.
    singular = torch.linalg.svdvals(torch.where(_finite(rows), rows, 0.0).detach())
    tolerance = torch.finfo(rows.dtype).eps ** 0.75
    return singular[..., -1] > tolerance * singular[..., 0]


def _least_norm(rows: Tensor, target: Tensor) -> Tensor:
    """The smallest X with `rows X = target`, for rows that are independent: `rows^+ target`.

    Through a QR decomposition of the transpose: half of the digits that the normal equations would lose are kept,
    and unlike a pseudo-inverse it costs no singular value decomposition. Where the rows are dependent, so that there
    is no such X, the answer is zero: finite, as are its derivatives, so that one task spoils no other of its batch.
    """
    if rows.shape[-2] > rows.shape[-1]:
        return torch.linalg.pinv(torch.where(_finite(rows), rows, 0.0)) @ target
    q, r = torch.linalg.qr(rows.mT)
    diagonal = torch.diagonal(r.detach(), dim1=-2, dim2=-1).abs()
    usable = diagonal.amin(-1) > torch.finfo(rows.dtype).eps * diagonal.amax(-1)
    if not bool(usable.all()):
        usable = usable.unsqueeze(-1).unsqueeze(-1)
        eye = torch.eye(*rows.shape[-2:], dtype=rows.dtype, device=rows.device)
        q, r = torch.linalg.qr(torch.where(usable, rows, eye).mT)
        target = torch.where(usable, target, 0.0)
    return q @ torch.linalg.solve_triangular(r.mT, target, upper=False)


def _finite(matrices: Tensor) -> Tensor:
    """Whether all entries of each matrix are finite, `(*batch, 1, 1)`."""
    return matrices.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
