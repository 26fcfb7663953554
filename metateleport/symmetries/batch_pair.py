"""Two layers with a nonlinear activation between them, invariant on one batch: the 2022 and the 2024 form."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from metateleport.groups import GeneralLinear
from metateleport.linalg import product
from metateleport.point import Point
from metateleport.symmetries._rows import fitted_to, has_full_rank, least_norm_over
from metateleport.symmetries.activations import inverse_of, pulled_back
from metateleport.symmetries.base import Carried, Pair, Unsuitable

__all__ = ["BatchPair2022", "BatchPair2024"]


class _BatchPair(Pair):
    exactness = "batch-exact"
    reads_place = False

    def __init__(self, model: nn.Module, first: str, second: str, activation: nn.Module, frozen: bool = False) -> None:
        super().__init__(model, first, second, frozen)
        self.group: GeneralLinear = GeneralLinear(self.width)
        if not isinstance(activation, nn.Module):
            raise Unsuitable(f"give the activation as a module such as nn.LeakyReLU(0.1), not {activation!r}")
        if any(True for _ in activation.parameters()):
            raise Unsuitable(f"{activation} has parameters of its own; the batch pairs take fixed activations")
        # A copy that overwrites nothing: pre-activations are read again after it.
        copied: Any = copy.deepcopy(activation)
        if hasattr(copied, "inplace"):
            copied.inplace = False
        self.activation: nn.Module = copied

    def holds(self, point: Point, element: Tensor | None = None) -> Tensor:
        return has_full_rank(self._solved_for(point, element))

    def act(self, element: Tensor, point: Point) -> Point:
        return self.action_at(point)(element)

    def _stands_alone(self, point: Point) -> bool:
        """Whether the point has gradients and cotangents of these two layers only."""
        return point.gradients.keys() <= set(self.parameters) and point.cotangents.keys() <= {self.first, self.second}

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
        z = product(point.activations[self.first], point.parameters[self.first_weight].mT)
        return z if self.first_bias is None else z + point.parameters[self.first_bias].unsqueeze(-2)

    def _rebuild(
        self,
        point: Point,
        parameters: dict[str, Tensor],
        before: Tensor,
        features: Tensor,
        on_second: Tensor | None,
        on_features: Tensor | None,
    ) -> Point:
        """The point at `parameters`, with the part of the backward pass below U's output recomputed.

        The outputs of U are unchanged, so the cotangent on them is known and nothing above U is recomputed.

        Args:
            point: where the element acted.
            parameters: those that moved.
            before: the pre-activations of V there, `(*batch, samples, width)`.
            features: the inputs of U there.
            on_second: the gradient of U there; None where the cotangent on its outputs is not known.
            on_features: the cotangent on the features there; None where the point knows none below.
        """
        activations = {self.second: features}
        if on_second is None:
            stale = point.stale | point.gradients.keys()
            return point.update(parameters, activations=activations, stale=frozenset(stale))
        if on_features is None:
            # The point has let go of everything below U: only U's gradient is made.
            stale = (point.stale | point.gradients.keys()) - {self.second_weight}
            return point.update(parameters, {self.second_weight: on_second}, activations, stale=frozenset(stale))
        below = pulled_back(self.activation, on_features, before, features)
        gradients = {
            self.second_weight: on_second,
            self.first_weight: product(below.mT, point.activations[self.first]),
        }
        if self.first_bias is not None:
            gradients[self.first_bias] = below.sum(-2)
        cotangents = {self.first: below}
        others = point.gradients.keys() - gradients.keys()
        stale = point.stale - gradients.keys()
        if self._stands_alone(point):
            return point.update(parameters, gradients, activations, cotangents, stale)
        if point.pullback is not None:
            lower, lower_cotangents = point.pullback(self.first, below @ parameters[self.first_weight])
            gradients.update(lower)
            cotangents.update(lower_cotangents)
        else:
            stale = stale | others
        return point.update(parameters, gradients, activations, cotangents, frozenset(stale))

    def rebuild_cost(self, point: Point) -> float:
        """Share of a gradient evaluation: a layer costs three products, and those that are recomputed count.

        In U's layer the product that sends the cotangent down is recomputed, in V's layer the weight gradient, in every
        layer below both of them. Layers whose cotangents the point no longer has are left out.
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
        frozen: whether parameters that are frozen (`requires_grad=False`) move too.

    Raises:
        Unsuitable: if the layers cannot form such a pair, or the activation has no inverse on the whole line.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 5), nn.LeakyReLU(0.1), nn.Linear(5, 1))
        >>> BatchPair2022(model, "0", "2", model[1]).exactness
        'batch-exact'

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), section 4.2.
    """

    kind = "batch pair, 2022 form"
    holds_by_element = False

    def __init__(self, model: nn.Module, first: str, second: str, activation: nn.Module, frozen: bool = False) -> None:
        super().__init__(model, first, second, activation, frozen)
        inverse = inverse_of(activation)
        if inverse is None:
            raise Unsuitable(f"{activation} has no known inverse on the whole line; the 2024 form does not need one")
        self._inverse = inverse

    def _solved_for(self, point: Point, element: Tensor | None) -> Tensor:
        return point.activations[self.first]

    def action_at(self, point: Point, gradients_only: bool = False) -> Callable[[Tensor], Point]:
        before, second = self._before(point), point.parameters[self.second_weight]
        features = self.activation(before)
        # Without layers below, the gradients do not depend on the new weights.
        weightless = gradients_only and self._stands_alone(point)
        if weightless:
            others = {name: value for name, value in point.parameters.items() if name not in self.parameters}
            start, least_norm = point.replace(parameters=others), None
        else:
            start, least_norm = point, least_norm_over(point.activations[self.first])
        # U and its inputs move linearly, so what the backward pass says of them is a covector.
        above = point.cotangents.get(self.second)
        on_second = None if above is None else product(above.mT, features)
        on_features = None if above is None or self.first not in point.cotangents else product(above, second)

        def act(element: Tensor) -> Point:
            inverse = self.group.inverse(element)
            moved_features = product(features, element.mT)
            moved = self._inverse(moved_features)
            parameters = {}
            if least_norm is not None:
                parameters[self.first_weight] = point.parameters[self.first_weight] + least_norm(moved - before).mT
                parameters[self.second_weight] = product(second, inverse)
            return self._rebuild(
                start,
                parameters,
                moved,
                moved_features,
                None if on_second is None else product(on_second, element.mT),
                None if on_features is None else product(on_features, inverse),
            )

        return act

    def _carry(self, element: Tensor, inverse: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # U moves linearly; what stands for V and b has no image under a linear map and stays.
        carried = {name: tensors[name] for name in self.parameters if name in tensors}
        if self.second_weight in carried:
            carried[self.second_weight] = product(carried[self.second_weight], element.mT)
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

    def matrices(self, point: Point, names: Collection[str] | None = None) -> dict[str, Tensor]:
        wanted = names is None or "preactivation_covariance" in names
        before = self._before(point) if wanted and self.first in point.activations else None
        found = super().matrices(point, names)
        return found if before is None else {**found, "preactivation_covariance": before.mT @ before}

    def _solved_for(self, point: Point, element: Tensor | None) -> Tensor:
        before = self._before(point)
        return self.activation(before if element is None else before @ element.mT)

    def action_at(self, point: Point, gradients_only: bool = False) -> Callable[[Tensor], Point]:
        before = self._before(point)
        if gradients_only and before.shape[-2] <= self.width:
            return self._gradients_at(point, before)
        second, old = point.parameters[self.second_weight], self.activation(before)
        above = point.cotangents.get(self.second)
        reaches_below = self.first in point.cotangents

        def act(element: Tensor) -> Point:
            moved = product(before, element.mT)
            features = self.activation(moved)
            shift = least_norm_over(features)((old - features) @ second.mT)
            parameters = {**self._moved_first(element, point), self.second_weight: second + shift.mT}
            return self._rebuild(
                point,
                parameters,
                moved,
                features,
                None if above is None else above.mT @ features,
                above @ parameters[self.second_weight] if above is not None and reaches_below else None,
            )

        return act

    def _gradients_at(self, point: Point, before: Tensor) -> Callable[[Tensor], Point]:
        """`action_at` without U, of which the backward pass needs only the product with the cotangent above."""
        above = point.cotangents.get(self.second)
        pulled = None
        if above is not None and self.first in point.cotangents:
            pulled = fitted_to(self.activation(before), above @ point.parameters[self.second_weight])
        # V is asked for by the layers below it.
        moves_first = not self._stands_alone(point)
        others = {name: value for name, value in point.parameters.items() if name not in self.parameters}
        start = point.replace(parameters=others)

        def act(element: Tensor) -> Point:
            moved = product(before, element.mT)
            features = self.activation(moved)
            return self._rebuild(
                start,
                self._moved_first(element, point) if moves_first else {},
                moved,
                features,
                None if above is None else above.mT @ features,
                None if pulled is None else pulled(features),
            )

        return act

    def _moved_first(self, element: Tensor, point: Point) -> dict[str, Tensor]:
        found = {self.first_weight: element @ point.parameters[self.first_weight]}
        if self.first_bias is not None:
            found[self.first_bias] = (element @ point.parameters[self.first_bias].unsqueeze(-1)).squeeze(-1)
        return found

    def _carry(self, element: Tensor, inverse: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # V and b move linearly; what stands for U has no image under a linear map and stays.
        carried = {name: tensors[name] for name in self.parameters if name in tensors}
        if self.first_weight in carried:
            carried[self.first_weight] = inverse.mT @ carried[self.first_weight]
        if self.first_bias is not None and self.first_bias in carried:
            carried[self.first_bias] = (inverse.mT @ carried[self.first_bias].unsqueeze(-1)).squeeze(-1)
        return carried
