"""The meta-optimizer: acceptance, teleport and update as one pure step on a stack of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge, gauge_symmetries
from metateleport.learned.config import MetaOptimizerConfig
from metateleport.learned.gauge import LearnedGauge
from metateleport.learned.progress import Progress
from metateleport.learned.rules.base import UpdateRule
from metateleport.learned.stand_in import StandIn
from metateleport.linalg import all_finite, certain, squarable, surely_finite
from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move, NoTeleport, Teleporter, travel

__all__ = ["InnerLoop", "MetaOptimizer", "MetaState", "Step"]

Regauge = Callable[[list[Gauge]], list[Gauge]]


@dataclasses.dataclass(frozen=True)
class MetaState:
    """The state of a meta-optimizer between steps.

    Args:
        progress: how each task is getting on.
        accepted: the last accepted point, where a step that made a task worse goes back to.
        teleporter: the teleporter's state.
        rule: the update rule's state.
        gauge: the learned gauge's state.
        stand_in: the stand-in for the loss if the rule divides by it and it is not known.
        deterministic: whether every evaluation sees the same data.
    """

    progress: Progress
    accepted: Point | None
    teleporter: Any
    rule: Any
    gauge: Any = None
    stand_in: StandIn | None = None
    deterministic: bool = True

    def map(self, function: Callable[[Tensor], Tensor]) -> MetaState:
        """Applies `function` to every tensor: detaching for truncated unrolls, moving to a device."""
        return MetaState(*(_mapped(getattr(self, field.name), function) for field in dataclasses.fields(self)))


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (Point, Progress, StandIn)):
        return value.map(function)
    if isinstance(value, dict):
        return {key: _mapped(each, function) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(each, function) for each in value)
    return value


@dataclasses.dataclass(frozen=True)
class Step:
    """The result of one step; tensors are `(tasks,)`.

    Args:
        parameters: where to evaluate next, stacked.
        teleported: where the teleport led to, before the update; its start is in the state as `accepted`.
        state: the state after the step.
        evaluations: gradient evaluations beyond the one that gave the point.
        accepted: where the point was accepted; elsewhere the step started again from the last accepted one.
        moves: what each symmetry contributed to the teleport that stays; none without a teleporter.
        gauges: that the step was taken in, and that were undone.
        stayed: tasks that stay where they are, because their gradient or their step was not finite.
    """

    parameters: Tensors
    teleported: Tensors
    state: MetaState
    evaluations: Tensor
    accepted: Tensor
    moves: tuple[Move, ...]
    gauges: tuple[Gauge, ...]
    stayed: Tensor

    @property
    def size(self) -> Tensor:
        """Frobenius norm of all generators of the teleport that stays together."""
        return sum((move.size.square() for move in self.moves), self._zero()).sqrt()

    @property
    def refused(self) -> Tensor:
        """Number of symmetries whose element was refused."""
        zero = self._zero()
        return sum((move.refused.to(zero.dtype) for move in self.moves), zero)

    def _zero(self) -> Tensor:
        return torch.zeros_like(self.state.progress.damping)


class MetaOptimizer(nn.Module):
    """Learns both the parameter update and the group element to move by.

    A step takes a point that has just been evaluated and answers with the parameters to evaluate next:

    1. accept the point or, task by task, go back to the last accepted one, with the step damped;
    2. teleport along the symmetries, gradients carried along;
    3. step each tensor in its gauge, within the curvature bound, and undo the gauge; a task whose step is not finite
       stays where it is.

    It is pure: networks are its parameters, all else is in the state. Without a graph `torch.compile` takes a step
    whole, with the rules `adaptive`, `tensor` and `lr` and with teleports. `LearnedOptimizer` wraps it for models, and
    `DifferentiableLearnedOptimizer` for `higher`.

    What the networks read is kept out of the graph. Only tests of the gradient itself set `detach` to False, here, in
    the teleporter and in the rule.

    Args:
        config: its shape.

    Example:
        >>> from metateleport.learned import StepSettings
        >>> meta = MetaOptimizer(MetaOptimizerConfig(StepSettings(hidden=4), teleport=None))
        >>> sum(p.numel() for p in meta.parameters()) < 1000
        True
    """

    def __init__(self, config: MetaOptimizerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MetaOptimizerConfig()
        self.detach = True
        self.gauge: LearnedGauge | None = None
        if config.gauge is not None:
            self.gauge = LearnedGauge(config.gauge_groups, config.gauge.hidden, config.gauge.metric_memory)
        self.teleporter: Teleporter | None = None
        if config.teleport is not None:
            self.teleporter = config.rule.teleporter(config.teleport, config.groups)
        self.rule: UpdateRule = config.rule.rule()

    @property
    def reads_symmetries(self) -> bool:
        """Whether it makes use of a model's symmetries: to move along, or as what tells which layer follows which."""
        parts = self.teleporter is not None or self.gauge is not None
        return parts or self.rule.divides_by_loss or self.rule.reads_factors

    def initial_state(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        deterministic: bool = True,
        teleporter: Teleporter | None = None,
    ) -> MetaState:
        """The state before the first step.

        Args:
            point: the first evaluation, one task dimension in front.
            symmetries: of the model, in the order of the data flow.
            deterministic: whether every evaluation sees the same data.
            teleporter: replaces the learned one (for attribution).
        """
        assert point.loss is not None
        chosen = teleporter or self.teleporter or NoTeleport()
        linear = self._linear(symmetries)
        return MetaState(
            progress=dataclasses.replace(
                Progress.begin(point.loss.detach() if self.detach else point.loss), deterministic=deterministic
            ),
            accepted=None,
            teleporter=chosen.initial_state(point, symmetries),
            rule=self.rule.initial_state(point),
            gauge=None if self.gauge is None else self.gauge.initial_state(point, linear),
            deterministic=deterministic,
        )

    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        state: MetaState,
        teleporter: Teleporter | None = None,
        regauge: Regauge | None = None,
        loss_known: bool = True,
        loss_fits: bool = True,
        along: Sequence[Symmetry] | None = None,
        spend: bool = False,
        finite: bool = False,
    ) -> Step:
        """One inner step on every task of the stack.

        Args:
            point: just evaluated at the parameters that the last step gave.
            symmetries: of the model, in the order of the data flow.
            state: what `initial_state` or the last step gave.
            teleporter: replaces the learned one (for attribution).
            regauge: replaces the learned gauges (for attribution).
            loss_known: whether the point's loss is that of this evaluation. If not, it has the tasks' shape and says
                nothing: every point is accepted, and no network reads it.
            loss_fits: whether the gradients are those of that loss. If not, a rule that divides by the loss is given a
                stand-in.
            along: those of the symmetries to move along and to step in gauges of; all of them if not given. The others
                tell how the layers follow one another.
            spend: whether the rule may overwrite `state`'s tensors, as nobody reads it again; only without a graph.
            finite: whether the point is known to have a loss and gradients that can be stepped along.

        Returns:
            The step.

        Raises:
            ValueError: if the point has no loss or no gradients.
        """
        if point.loss is None or not point.gradients:
            raise ValueError("a step needs an evaluated point: loss and gradients")
        chosen = teleporter or self.teleporter or NoTeleport()
        if loss_known:
            seen = point.loss.detach() if self.detach else point.loss
            progress, accepted = state.progress.judge(seen, state.deterministic, self.rule.tolerance)
        else:
            progress = state.progress.unjudged()
            accepted = progress.accepted
        stand_in = state.stand_in
        if self.rule.divides_by_loss and not loss_fits:
            stand_in = StandIn.begin(point) if stand_in is None else stand_in.seen(point.gradients)
            point = point.replace(loss=stand_in.value(point.gradients))
        base = point
        if state.accepted is not None and not progress.all_accepted:
            # The only task's own point may be of a batch of another size.
            one = accepted.numel() == 1
            base = state.accepted if one else point.choose(accepted, state.accepted)
        teleporter_state = chosen.judged(state.teleporter, progress, accepted)
        usable = torch.ones_like(accepted) if finite and base is point else _finite(base)
        start = base if certain(usable) else _emptied(base, ~usable)
        along = symmetries if along is None else along
        moved = start
        moves: list[Move] = []
        if along and not isinstance(chosen, NoTeleport):
            moved, moves, teleporter_state = travel(chosen, start, along, teleporter_state, allowed=accepted & usable)
        rule_state = self.rule.carry(state.rule, moves, start, accepted, spend)
        gauges, gauge_state = self._gauges(moved, along, progress, state, moves)
        if regauge is not None:
            gauges = regauge(gauges)
        given = moved
        if spend and stand_in is None:
            # A rule may let go of the gradients once it has made use of them, and nobody else holds carried ones, nor
            # what was carried of the pass.
            given = dataclasses.replace(moved, gradients=dict(moved.gradients))
            if not (self.rule.reads_pass or gauges):
                given = dataclasses.replace(given, activations={}, cotangents={})
            moved = moved if moved is start else moved.replace(gradients={}, activations={}, cotangents={})
        parameters, rule_state = self.rule.step(given, symmetries, progress, rule_state, gauges, spend)
        parameters, moves_on = _where_finite(parameters, base, usable)
        if stand_in is not None and not loss_fits:
            stand_in = stand_in.stepped(moved.parameters, parameters, moved.gradients)
        zero = torch.zeros_like(progress.damping)
        kept = base.replace(pullback=None, loss_at=None) if loss_known else None
        return Step(
            parameters=parameters,
            teleported=moved.parameters,
            state=MetaState(progress, kept, teleporter_state, rule_state, gauge_state, stand_in, state.deterministic),
            evaluations=sum((move.evaluations for move in moves), zero),
            accepted=accepted,
            moves=tuple(moves),
            gauges=tuple(gauges),
            stayed=~moves_on,
        )

    def _linear(self, symmetries: Sequence[Symmetry]) -> tuple[Symmetry, ...]:
        return gauge_symmetries(symmetries, self.config.linearised)

    def _gauges(
        self, point: Point, symmetries: Sequence[Symmetry], progress: Progress, state: MetaState, moves: Sequence[Move]
    ) -> tuple[list[Gauge], Any]:
        if self.gauge is None:
            return [], None
        moved: Tensor | None = None
        if moves:
            moved = torch.stack([move.size > 0 for move in moves]).any(0)
        linear = self._linear(symmetries)
        return self.gauge.choose(point, linear, progress, state.gauge, state.deterministic, moved)


@dataclasses.dataclass
class InnerLoop:
    """Judges an evaluation, teleports and steps, and remembers what it has to.

    All parts of the library use this inner loop: meta-training through `higher`, evaluation on stacks of tasks, and
    `metateleport.LearnedOptimizer` on a stack of one task.

    Args:
        meta: the meta-optimizer.
        symmetries: of the model, in the order of the data flow.
        deterministic: whether every evaluation sees the same data.
        teleporter: replaces the learned one (for attribution).
        regauge: replaces the learned gauges (for attribution).
        state: where to go on from; None before the first step.
        spends: whether nobody else reads a state of it, so that one step's memory serves the next; without a graph.
        total: number of steps of the run, where it is known; rules that cool down by it are told.

    Example:
        >>> import torch
        >>> from metateleport.learned import MetaOptimizerConfig, StepSettings
        >>> loop = InnerLoop(MetaOptimizer(MetaOptimizerConfig(StepSettings(hidden=4), teleport=None)))
        >>> weights = {"w": torch.ones(1, 2)}
        >>> for _ in range(3):
        ...     point = Point(weights, gradients=dict(weights), loss=weights["w"].square().sum(1) / 2)
        ...     weights = loop.advance(point).parameters
        >>> bool(weights["w"].abs().sum() < 2)
        True
    """

    meta: MetaOptimizer
    symmetries: Sequence[Symmetry] = ()
    deterministic: bool = True
    teleporter: Teleporter | None = None
    regauge: Regauge | None = None
    state: MetaState | None = None
    last_step: Step | None = None
    spends: bool = False
    total: int | None = None

    def advance(
        self,
        point: Point,
        loss_known: bool = True,
        loss_fits: bool = True,
        along: Sequence[Symmetry] | None = None,
        finite: bool = False,
    ) -> Step:
        """One inner step on every task.

        Args:
            point: just evaluated at the parameters that the last step gave.
            loss_known: whether the point's loss is the loss of this evaluation; if not, nothing is taken back.
            loss_fits: whether gradients and cotangents are those of this loss, and not multiples; if not, rules that
                divide by it take a stand-in.
            along: those of the symmetries to move along and to step in gauges of; all of them if not given.
            finite: whether the point is known to have a loss and gradients that can be stepped along.

        Returns:
            The step; its `parameters` are to be evaluated next.
        """
        if self.state is None:
            self.state = self.meta.initial_state(point, self.symmetries, self.deterministic, self.teleporter)
        if self.state.progress.total != self.total:
            told = dataclasses.replace(self.state.progress, total=self.total)
            self.state = dataclasses.replace(self.state, progress=told)
        fits = loss_known and loss_fits
        step = self.meta.step(
            point,
            self.symmetries,
            self.state,
            self.teleporter,
            self.regauge,
            loss_known,
            fits,
            along,
            self.spends,
            finite,
        )
        self.state, self.last_step = step.state, step
        return step


def _finite(point: Point) -> Tensor:
    """Where the loss is finite and all gradients so small that their squares are, `(tasks,)`."""
    assert point.loss is not None
    return point.loss.detach().isfinite() & squarable(point.gradients.values(), point.loss.ndim)


def _emptied(point: Point, mask: Tensor) -> Point:
    """The point with what was evaluated put to zero where `mask` is true, and the loss to one.

    Exchanged before anything is computed with it: a value that is not finite would reach the meta-gradient of the
    whole stack, however little is made of it afterwards.
    """
    assert point.loss is not None

    def zeroed(tensors: Tensors) -> Tensors:
        return {
            name: value.masked_fill(mask.reshape(*mask.shape, *(1,) * (value.ndim - mask.ndim)), 0.0)
            for name, value in tensors.items()
        }

    return point.replace(
        gradients=zeroed(point.gradients),
        activations=zeroed(point.activations),
        cotangents=zeroed(point.cotangents),
        loss=point.loss.masked_fill(mask, 1.0),
    )


def _where_finite(parameters: Tensors, base: Point, usable: Tensor) -> tuple[Tensors, Tensor]:
    """The new parameters of each task that is usable and whose parameters are finite, the others stay; and where."""
    if surely_finite(list(parameters.values())) and certain(usable):
        return parameters, usable
    finite = usable & all_finite(parameters.values(), usable.ndim)
    if certain(finite):
        return parameters, finite
    chosen = {}
    for name, value in parameters.items():
        mask = finite.reshape(*finite.shape, *(1,) * (value.ndim - finite.ndim))
        chosen[name] = torch.where(mask, value, base.parameters[name])
    return chosen, finite
