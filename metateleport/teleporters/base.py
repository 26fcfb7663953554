"""The interface of every teleporter, and `travel`, which applies one along a model's symmetries."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metateleport.groups import Group, still
from metateleport.linalg import certain, possible
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.symmetries.base import overridden
from metateleport.teleporters.failures import NO_GAIN, UNSTABLE, add_failure

__all__ = ["Chosen", "Move", "Teleporter", "TrustRegion", "travel"]


@dataclasses.dataclass(frozen=True)
class TrustRegion:
    """Bounds on a teleport; one that breaks a bound is refused, and the weights stay.

    Args:
        max_size: Frobenius norm of a generator.
        max_condition: condition number of a group element; by default one that costs half of the dtype's digits.
        max_drift: relative change of the outputs or the loss, where it is measured.

    Example:
        >>> TrustRegion().condition_for(torch.float64) > 1e7
        True
    """

    max_size: float = 100.0
    max_condition: float | None = None
    max_drift: float = 1e-2

    def condition_for(self, dtype: torch.dtype) -> float:
        """The bound on condition numbers in a dtype."""
        return self.max_condition or float(torch.finfo(dtype).eps ** -0.5)


class Chosen(NamedTuple):
    """A group element chosen without a generator.

    Args:
        element: `(*batch, *group.shape)`.
        size: `(*batch,)`.
        evaluations: gradient evaluations that choosing it cost, `(*batch,)`; those that the teleporter names
            beforehand if not given.
    """

    element: Tensor
    size: Tensor
    evaluations: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Move:
    """What one symmetry contributed to a teleport; tensors are `(*batch,)`.

    Args:
        symmetry: the symmetry moved along.
        element: the group element, the identity where refused.
        size: Frobenius norm of the generator, or the summed norms of several steps; zero where refused.
        refused: where the trust region or the symmetry's condition forbade the proposed element.
        evaluations: gradient evaluations that the teleporter and the rebuilding of gradients cost.
        reason: why it was refused, where it was; empty otherwise.
        gain: relative change of the objective, positive in the intended direction; None if there is no objective.
        failures: observations, in any task, by the names in `metateleport.teleporters.FAILURES`.
    """

    symmetry: Symmetry
    element: Tensor
    size: Tensor
    refused: Tensor
    evaluations: Tensor
    reason: str = ""
    gain: Tensor | None = None
    failures: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Teleporter:
    """Chooses a group element for each symmetry of a model.

    A teleporter returns a generator (Lie algebra element) at a point; it never touches weights. Its memory between
    teleports is a state that the caller keeps, so that one teleporter serves many models. Teleporters that move the
    weights along no symmetry derive from `metateleport.teleporters.free.FreeTeleporter`.

    Args:
        trust_region: bounds on each teleport.
    """

    name: str = ""
    needs_gradient: bool = False
    """Whether the point has to carry gradients: then a loss is needed."""
    needs_loss: bool = False
    """Whether it evaluates the loss elsewhere: then the point has to have a `loss_at`."""
    needs_symmetries: bool = True
    """Whether it moves along symmetries; if not, symmetries are ignored."""
    keeps: Literal["outputs", "loss"] = "outputs"
    """What a teleport leaves unchanged; the bound on the drift applies to it."""
    keeps_points: bool = True
    """Whether it may hold on to a point that it has seen; if not, a later symmetry may move it in its own memory."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        # What a base class says of its own choosing says nothing of another one.
        if overridden(cls, "keeps_points", ("choose", "generator", "gain")):
            cls.keeps_points = True

    def __init__(self, trust_region: TrustRegion | None = None) -> None:
        self.trust_region = trust_region or TrustRegion()

    @property
    def groups(self) -> tuple[str, ...] | None:
        """Names of the groups that it can move along; None for any."""
        return None

    def initial_state(self, point: Point, symmetries: Sequence[Symmetry]) -> Any:
        """The state before the first teleport; None for teleporters that remember nothing."""
        return None

    def evaluations(self, symmetry: Symmetry, point: Point) -> float:
        """Gradient evaluations that choosing one generator costs; algebra on what is known already is free."""
        return 0.0

    def gain_evaluations(self, symmetry: Symmetry, point: Point) -> float:
        """Gradient evaluations that one `gain` costs."""
        return 0.0

    def watches(self, model: nn.Module) -> tuple[str, ...]:
        """Names of modules whose inputs it needs, besides those that the symmetries need."""
        return ()

    def gain(self, start: Point, arrived: Point) -> Tensor | None:
        """Relative change of its objective between two points, positive in the intended direction, `(*batch,)`."""
        return None

    def told(self, state: Any, loss: Tensor, deterministic: bool) -> Any:
        """The state once the loss of this evaluation is known, for callers that never take steps back.

        Args:
            state: after the last teleport.
            loss: `(*batch,)`.
            deterministic: whether every evaluation sees the same data.
        """
        return state

    def judged(self, state: Any, progress: Any, accepted: Tensor) -> Any:
        """The state once the last step is judged.

        Args:
            state: after the last teleport.
            progress: how each task is getting on, a `metateleport.learned.progress.Progress`.
            accepted: where the task goes on; elsewhere it is back where it was before the last teleport, `(tasks,)`.
        """
        return state

    def refused(self, state: Any) -> Any:
        """The state to go on with if the whole teleport was refused; `state` is the one it returned."""
        return state

    def travel(
        self, point: Point, symmetries: Sequence[Symmetry], state: Any, allowed: Tensor | None
    ) -> tuple[Point, list[Move], Any]:
        """Moves a point; arguments and results as in the function `travel`, which checks them first."""
        moves = []
        own: frozenset[str] = frozenset()
        for symmetry in reversed(symmetries):
            start = point
            proposed, state = self.choose(symmetry, start, state)
            point, move, own = _carry_out(self, symmetry, start, proposed, allowed, own)
            moves.append(move)
        return point, moves, state

    def choose(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Tensor | Chosen, Any]:
        """A generator, or an element without one, and the new state; arguments as in `generator`."""
        return self.generator(symmetry, point, state)

    def generator(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        """Chooses the generator for one symmetry.

        Args:
            symmetry: the symmetry to move along.
            point: where the model stands, earlier symmetries of the same teleport already moved.
            state: what `initial_state` or the last call gave.

        Returns:
            The generator, `(*batch, *symmetry.group.shape)`, and the new state.

        Raises:
            TypeError: if it moves without generators.
        """
        raise TypeError(f"{type(self).__name__} has no generators: call travel()")


def travel(
    teleporter: Teleporter,
    point: Point,
    symmetries: Sequence[Symmetry],
    state: Any = None,
    allowed: Tensor | None = None,
) -> tuple[Point, list[Move], Any]:
    """Moves a point along its symmetries, one after the other, from the last layer to the first.

    In that order a batch pair acts while all layers below it are still as in the forward pass, so that the part of the
    backward pass that it rebuilds is right.

    Args:
        teleporter: chooses the generators.
        point: where to start.
        symmetries: in the order of the data flow.
        state: the teleporter's state; a new one if not given.
        allowed: where moving is allowed at all, boolean `(*batch,)`.

    Returns:
        The moved point, a move for each symmetry in the order travelled, and the teleporter's new state.

    Raises:
        ValueError: if the teleporter needs gradients or the loss as a function and the point has none.
    """
    if teleporter.needs_gradient and not point.gradients:
        raise ValueError(f"{type(teleporter).__name__} needs gradients: give a loss, or call backward() first")
    if teleporter.needs_loss and point.loss_at is None:
        raise ValueError(
            f"{type(teleporter).__name__} evaluates the loss at other weights: give the loss as a function"
        )
    if state is None:
        state = teleporter.initial_state(point, symmetries)
    return teleporter.travel(point, symmetries, state, allowed)


def _carry_out(
    teleporter: Teleporter,
    symmetry: Symmetry,
    start: Point,
    proposed: Tensor | Chosen,
    allowed: Tensor | None,
    own: frozenset[str],
) -> tuple[Point, Move, frozenset[str]]:
    """Moves a point along one symmetry.

    Args:
        own: names of the parameters whose tensors in `start` were made in this teleport, and that nobody else holds.

    Returns:
        The moved point, the move, and `own` of the moved point.
    """
    group, region, exact = symmetry.group, teleporter.trust_region, symmetry.exactness == "exact"
    size = proposed.size if isinstance(proposed, Chosen) else group.norm(proposed.detach())
    holds = None if exact else symmetry.holds(start)
    # Of what is not finite both are false.
    within = size <= region.max_size
    if isinstance(proposed, Chosen):
        within = within & (group.norm(proposed.element) < math.inf)
    usable = within
    for condition in (allowed, holds):
        usable = usable if condition is None else usable & condition
    # What is refused is exchanged for the identity before anything is computed with it: a value that is not
    # finite would reach the gradients of the others through the selection below.
    element = _element_where(usable, group, proposed)
    conditioned = group.conditioned(still(element), region.condition_for(element.dtype))
    accepted = usable & conditioned
    lawful = None
    if not exact and symmetry.holds_by_element:
        lawful = symmetry.holds(start, element.detach())
        accepted = accepted & lawful
    moved = accepted & (size > 0)
    reason: str = ""
    failures: dict[str, str] = {}
    # Where all tasks move, that one look tells the rest.
    all_move = certain(moved)
    whole = all_move or certain(accepted)
    if not whole:
        finite = size.isfinite()
        if isinstance(proposed, Chosen):
            finite = finite & group.norm(proposed.element).isfinite()
        refusals = [] if allowed is None else [("moving was not allowed", ~allowed)]
        for met in (holds, lawful):
            if met is not None:
                refusals.append((f"the condition of the {symmetry.kind} does not hold on this batch", ~met))
        unstable = [
            ("the proposed generator is not finite", ~finite),
            (f"the generator is larger than {region.max_size:g}", finite & ~within),
            (f"the element's condition number is above {region.condition_for(element.dtype):.1e}", ~conditioned),
        ]
        told = reasons(refusals + unstable)
        reason = "; ".join(told)
        failures = add_failure(failures, UNSTABLE, "; ".join(text for text, _ in unstable if text in told))
    zero = torch.zeros_like(size)
    known = proposed.evaluations if isinstance(proposed, Chosen) else None
    choosing = zero + teleporter.evaluations(symmetry, start) if known is None else known
    arriving = symmetry.rebuild_cost(start) + teleporter.gain_evaluations(symmetry, start)
    cost = moved.to(size.dtype) * arriving + choosing if arriving else choosing
    if not all_move and not possible(moved):
        identity = group.identity(*size.shape, dtype=element.dtype, device=element.device)
        return start, Move(symmetry, identity, zero, ~accepted, choosing, reason, failures=failures), own
    if not whole:
        element = _element_where(accepted, group, proposed)
    if all_move:
        arrived, own = _acted(teleporter, symmetry, element, start, own)
    else:
        part = symmetry.act(element, start).choose(moved, start)
        arrived, own = part.replace(pullback=start.pullback), frozenset()
    gain = teleporter.gain(start, arrived)
    if gain is not None:
        failures = add_failure(failures, NO_GAIN, gainless(gain, moved))
    travelled = size if all_move else torch.where(moved, size, zero)
    return arrived, Move(symmetry, element, travelled, ~accepted, cost, reason, gain, failures), own


def _acted(
    teleporter: Teleporter, symmetry: Symmetry, element: Tensor, start: Point, own: frozenset[str]
) -> tuple[Point, frozenset[str]]:
    """What an element moves a point to, in the memory of what is `own`, and what is then; as in `_carry_out`."""
    free = not (teleporter.keeps_points or torch.is_grad_enabled())
    moving = symmetry.multipliers(element, "vectors") if free else None
    if moving is None:
        return symmetry.act(element, start), frozenset()
    owned = own.union(symmetry.parameters)
    moving = {name: value for name, value in moving.items() if name in own and name in start.parameters}
    if not moving:
        return symmetry.act(element, start), owned
    covectors = symmetry.multipliers(element, "covectors")
    assert covectors is not None
    others, on_others = (
        {name: value for name, value in tensors.items() if name not in moving}
        for tensors in (start.parameters, start.gradients)
    )
    rest = symmetry.act(element, start.replace(parameters=others, gradients=on_others))
    parameters = {name: start.parameters[name].mul_(value) for name, value in moving.items()}
    gradients = {name: start.gradients[name].mul_(covectors[name]) for name in moving if name in start.gradients}
    # In the order of the start, which rules go by.
    arrived = rest.replace(
        parameters={**start.parameters, **rest.parameters, **parameters},
        gradients={**start.gradients, **rest.gradients, **gradients},
    )
    return arrived, owned


def reasons(refusals: Sequence[tuple[str, Tensor]]) -> list[str]:
    """The reasons that apply in any task, each once; a compiled step has none to tell.

    Args:
        refusals: a reason and where it applies, boolean `(*batch,)`.
    """
    if torch.compiler.is_compiling():
        return []
    # All at once: on an accelerator each look at a number is a wait.
    apply = torch.stack([where.any() for _, where in refusals]).tolist()
    return list(dict.fromkeys(text for (text, _), applies in zip(refusals, apply, strict=True) if applies))


def gainless(gain: Tensor, where: Tensor) -> str:
    """Says that the objective did not grow in some of the named tasks; empty if it grew in all of them."""
    lost = where & ~(gain > 0)
    return f"what was sought changed by {float(gain[lost].min()):.1e}, relatively" if bool(lost.any()) else ""


def _element_where(mask: Tensor, group: Group, proposed: Tensor | Chosen) -> Tensor:
    """The proposed element where `mask` is true, the identity elsewhere."""
    mask = group.expand(mask)
    if isinstance(proposed, Chosen):
        given = proposed.element
        one = group.identity(*proposed.size.shape, dtype=given.dtype, device=given.device)
        return torch.where(mask, given, one)
    return group.exp(torch.where(mask, proposed, torch.zeros_like(proposed)))
