"""Steps in gauges: a group element acts, one side of a symmetry is stepped, and the element is undone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metateleport.point import Point, Tensors
from metateleport.symmetries import LinearisedPair, LinearPair, Pair, Symmetry
from metateleport.teleporters import Move, Teleporter, travel

__all__ = [
    "Gauge",
    "GaugedStep",
    "Names",
    "TensorGroup",
    "gauge_symmetries",
    "precondition",
    "step_in_gauges",
    "tensor_groups",
    "undo",
]

Names = tuple[str, ...]
Side = Literal["in", "out"]


@dataclasses.dataclass(frozen=True)
class Gauge:
    r"""A group element that the tensors of one side of a symmetry are stepped in.

    Args:
        symmetry: acts linearly on the weights.
        side: `in` for the tensors that read the features that move (U), `out` for those that output them (V and b).
        names: of the tensors.
        element: the group element, `(*batch, *symmetry.group.shape)`.
        size: Frobenius norm of its generator, `(*batch,)`.
        square: what a step in the gauge multiplies the tensors' covectors with, $g^\top g$ or its inverse, where a
            gauge of a linear pair is held for several steps.
        above: the bound on the curvature above, seen in the gauge, `(*batch,)`, where it is held too.
    """

    symmetry: Symmetry
    side: Side
    names: Names
    element: Tensor
    size: Tensor
    square: Tensor | None = None
    above: Tensor | None = None

    @functools.cached_property
    def inverse(self) -> Tensor:
        """The element's inverse, made once."""
        return self.symmetry.group.inverse(self.element)

    def detached(self) -> Gauge:
        """The gauge outside of the graph."""
        return dataclasses.replace(self, element=self.element.detach()) if self.element.requires_grad else self

    def incoming(self, rows: Tensor) -> Tensor:
        """Features in rows, `(*batch, samples, width)`, seen in the gauge: $g h$."""
        if len(self.symmetry.group.shape) == 1:
            return rows * self.element.unsqueeze(-2)
        return rows @ self.element.mT

    def outgoing(self, matrix: Tensor) -> Tensor:
        r"""A form on the side above, `(*batch, width, width)`, seen in the gauge: $g^{-\top} S g^{-1}$."""
        inverse = self.inverse
        if len(self.symmetry.group.shape) == 1:
            return inverse.unsqueeze(-1) * matrix * inverse.unsqueeze(-2)
        return inverse.mT @ matrix @ inverse


def gauge_symmetries(symmetries: Sequence[Symmetry], linearised: bool) -> tuple[Symmetry, ...]:
    """The linear actions that gauges are chosen from.

    Args:
        symmetries: of a model, in the order of the data flow.
        linearised: treat pairs of linear layers with an activation between them as linear (`LinearisedPair`), as a
            gauge needs no invariance. Otherwise only exact symmetries are used.

    Returns:
        In the same order, one for each pair of layers, or head of an attention.

    Example:
        >>> from torch import nn
        >>> from metateleport import Rescaling
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
        >>> [each.dimension for each in gauge_symmetries([Rescaling(model, "0", "2")], linearised=True)]
        [4]
    """
    found: dict[Any, Symmetry] = {}
    for symmetry in symmetries:
        key: Any = symmetry.key
        chosen: Symmetry | None = symmetry if symmetry.exactness == "exact" and not symmetry.buffers else None
        if isinstance(symmetry, Pair):
            key = symmetry.modules
            if linearised and symmetry.is_dense and not isinstance(symmetry, LinearPair):
                chosen = LinearisedPair(symmetry)
        if chosen is not None:
            found.setdefault(key, chosen)
    return tuple(found.values())


def precondition(gauges: Sequence[Gauge], covectors: Mapping[str, Tensor], point: Point) -> Tensors:
    r"""Steps along covectors, taken in gauges: $p \mapsto g^{-1} (g \cdot p)$.

    For factors $U V$ these are $G_U\, g^\top g$ and $(g^\top g)^{-1} G_V$.

    Args:
        gauges: several may serve one tensor, on its two sides.
        covectors: by parameter name, `(*batch, *shape)`.
        point: where the model stands.

    Returns:
        All of `covectors`, those of the gauges' tensors changed.
    """
    stepped = dict(covectors)
    for gauge in gauges:
        own = {name: stepped[name] for name in gauge.names if name in stepped}
        if not own:
            continue
        if gauge.square is not None and isinstance(gauge.symmetry, LinearPair):
            stepped.update(gauge.symmetry.multiplied(gauge.square, own))
        else:
            stepped.update(gauge.symmetry.preconditioned(gauge.element, gauge.inverse, own, point))
    return stepped


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """Tensors that one gauge serves: the same symmetries move them, in the same role.

    Args:
        names: of the tensors.
        symmetries: those that move them, in the order of the data flow.
    """

    names: Names
    symmetries: tuple[Symmetry, ...]


@dataclasses.dataclass(frozen=True)
class GaugedStep:
    """The result of a step in gauges.

    Args:
        parameters: all parameters after the step, back in the model's own place on the orbit.
        evaluations: gradient evaluations that the gauges cost, `(*batch,)`.
        moves: each gauge as a move, by the group's names; elements other than the identity were undone.
        states: the teleporters' states, by the group's names.
    """

    parameters: Tensors
    evaluations: Tensor
    moves: dict[Names, list[Move]]
    states: dict[Names, Any]


def tensor_groups(names: Sequence[str], symmetries: Sequence[Symmetry]) -> tuple[TensorGroup, ...]:
    """Sorts tensors by the symmetries that move them, and by whether they read or output the features that move.

    Args:
        names: of the tensors.
        symmetries: in the order of the data flow.

    Returns:
        The groups, in the order of the names. A weight and its bias share one; tensors that nothing moves share one
        without symmetries.

    Example:
        >>> from torch import nn
        >>> from metateleport import LinearPair
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        >>> groups = tensor_groups([name for name, _ in model.named_parameters()], [LinearPair(model, "0", "1")])
        >>> [group.names for group in groups]
        [('0.weight', '0.bias'), ('1.weight',), ('1.bias',)]
    """
    sorted_names: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for name in names:
        moving = [(index, each) for index, each in enumerate(symmetries) if name in each.parameters]
        sorted_names.setdefault(tuple((index, _role(name, each)) for index, each in moving), []).append(name)
    return tuple(
        TensorGroup(tuple(members), tuple(symmetries[index] for index, _ in key))
        for key, members in sorted_names.items()
    )


def _role(name: str, symmetry: Symmetry) -> str:
    side = symmetry.side(name)
    return name if side == "both" else side


def step_in_gauges(
    point: Point,
    symmetries: Sequence[Symmetry],
    teleporter: Callable[[TensorGroup], Teleporter],
    step: Callable[[Point, Names], Mapping[str, Tensor]],
    states: Mapping[Names, Any] | None = None,
    allowed: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> GaugedStep:
    r"""Steps each tensor in a gauge of its own and undoes the gauge.

    $$W_i \mapsto g_i^{-1} \cdot \left(\mathrm{step}(g_i \cdot W)\right)_i$$

    The model does not move along its orbit: a gauge is a preconditioner. For factors $U V$, gradient descent in the
    gauges $g_U = (V V^\top)^{-1/2}$ and $g_V = (U^\top U)^{1/2}$ is ScaledGD,
    $U \mapsto U - \eta\, G_U (V V^\top)^{-1}$ and $V \mapsto V - \eta\, (U^\top U)^{-1} G_V$.

    Only what the stepped tensors' gradients need is rebuilt and counted: nothing for exact symmetries, and nothing
    for the upper layer of a batch pair.

    Args:
        point: with gradients; activations and cotangents where a symmetry needs them.
        symmetries: in the order of the data flow.
        teleporter: chooses the elements for a group of tensors.
        step: gets the point in the gauge and the names of the tensors to step; gives those tensors after the step.
        states: the teleporters' states by the group's names, as the last call gave them.
        allowed: where a gauge is allowed at all, boolean `(*batch,)`; elsewhere tensors are stepped as they are.
        names: the tensors to step; all that have a gradient if not given.

    Returns:
        The step.

    Raises:
        ValueError: if the point has no gradients.

    Example:
        >>> from torch import nn
        >>> from metateleport import LinearPair, NoTeleport
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        >>> ones = {name: torch.ones_like(value) for name, value in model.named_parameters()}
        >>> point = Point({name: value.detach() for name, value in model.named_parameters()}, ones)
        >>> descent = lambda at, names: {name: at.parameters[name] - 0.1 * at.gradients[name] for name in names}
        >>> stepped = step_in_gauges(point, [LinearPair(model, "0", "1")], lambda group: NoTeleport(), descent)
        >>> bool(torch.allclose(stepped.parameters["1.weight"], model[1].weight - 0.1))
        True

    Source: Tong, Ma and Chi, JMLR 2021 (arXiv 2005.08898), equation 3, for linear pairs.
    """
    if not point.gradients:
        raise ValueError("a step in gauges needs gradients: evaluate the point first")
    batch = () if point.loss is None else point.loss.shape
    like = next(iter(point.gradients.values()))
    spent = like.new_zeros(batch)
    parameters, moves, new_states = dict(point.parameters), {}, {}
    for group in tensor_groups(list(point.gradients) if names is None else names, symmetries):
        if not group.symmetries:
            parameters.update(step(point, group.names))
            continue
        start = only_for(point, group.names, group.symmetries)
        before = None if states is None else states.get(group.names)
        arrived, made, after = travel(teleporter(group), start, group.symmetries, before, allowed)
        stepped = arrived.replace(parameters={**arrived.parameters, **step(arrived, group.names)})
        home, cost = undo(made, stepped, group.names)
        parameters.update({name: home.parameters[name] for name in group.names})
        moves[group.names], new_states[group.names] = made, after
        spent = spent + sum((move.evaluations for move in made), cost)
    return GaugedStep(parameters, spent, moves, new_states)


def undo(moves: Sequence[Move], point: Point, changed: Names = ()) -> tuple[Point, Tensor]:
    """Moves a point back by the inverse of each move, the last one first.

    Args:
        moves: as `travel` gave them.
        point: where they led to, or what a step has made of it.
        changed: names of the parameters that were changed since: where a batch pair has to run them again, that is
            counted.

    Returns:
        The point, and the gradient evaluations that it cost, `(*batch,)`. Its gradients are not those of the new
        place where a symmetry is not exact. Where a symmetry has no group law (the 2024 form with fewer samples than
        units) it is another point with the same outputs on the batch.
    """
    cost: Tensor = torch.zeros_like(moves[0].size) if moves else torch.zeros(())
    # What a batch pair would rebuild of the backward pass is not asked for.
    bare = point.replace(cotangents={}, pullback=None)
    for move in reversed(moves):
        moved = move.size > 0
        if not bool(moved.any()):
            continue
        symmetry = move.symmetry
        back = symmetry.act(symmetry.group.inverse(move.element), bare)
        bare = back if bool(moved.all()) else back.choose(moved, bare)
        cost = cost + moved.to(cost.dtype) * symmetry.undo_cost(point, changed)
    return bare, cost


def only_for(point: Point, names: Sequence[str], symmetries: Sequence[Symmetry]) -> Point:
    """The point without what only other tensors' gradients need, so that it is neither rebuilt nor counted.

    Args:
        point: where to move from.
        names: of the tensors that are going to be stepped.
        symmetries: those that are going to be moved along.
    """
    needed = {symmetry.second for symmetry in symmetries if isinstance(symmetry, Pair)}
    needed |= {name.rpartition(".")[0] for name in names}
    order = list(point.activations)
    lowest = min((order.index(name) for name in needed if name in order), default=0)
    cotangents = {name: value for name, value in point.cotangents.items() if name not in order[:lowest]}
    return point.replace(cotangents=cotangents, pullback=None)
