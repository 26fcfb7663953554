"""The learned meta-optimizer: acceptance, teleport, update, as one pure step on a stack of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge, gauge_symmetries
from metateleport.learned.gauge import LearnedGauge
from metateleport.learned.progress import Progress
from metateleport.learned.rules import BaseRule, UpdateRule
from metateleport.learned.rules.adaptive import AdaptiveRule
from metateleport.learned.rules.coordinate import CoordinateRule
from metateleport.learned.rules.flat import FlatRule, FlatTeleporter
from metateleport.learned.rules.step import StepRule
from metateleport.learned.rules.tensor import TensorRule
from metateleport.learned.stand_in import StandIn
from metateleport.learned.teleporter import LearnedTeleporter
from metateleport.linalg import all_finite
from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move, NoTeleport, Teleporter, TrustRegion, travel
from metateleport.teleporters.reach import check_max_stretch

__all__ = ["GAUGES", "MODES", "UPDATES", "GaugeKind", "MetaOptimizer", "MetaOptimizerConfig", "MetaState", "Step"]

GaugeKind = Literal["none", "exact", "linearised"]
GAUGES: tuple[GaugeKind, ...] = ("none", "exact", "linearised")
UpdateSize = Literal["coordinate", "tensor", "adaptive"]
UPDATES: tuple[UpdateSize, ...] = ("coordinate", "tensor", "adaptive")
Mode = Literal["update", "lr", "update+tele", "lr+tele", "tele"]
MODES: tuple[Mode, ...] = ("update", "lr", "update+tele", "lr+tele", "tele")


Regauge = Callable[[list[Gauge]], list[Gauge]]


@dataclasses.dataclass(frozen=True)
class MetaOptimizerConfig:
    """The shape of a meta-optimizer; everything that is needed to build it again.

    Args:
        mode: what is learned: `update` (every coordinate), `lr` (a step for each tensor), `tele` (the group element,
            followed by `base`), or one of the first two with `+tele`.
        network: `equivariant`, or `flat` for the source paper's networks, which serve one shape only.
        hidden: units of the LSTMs that look at symmetries and tensors.
        coordinate_hidden: units of the coordinate-wise LSTM.
        groups: names of the groups that the teleporter has networks for.
        base: optimizer of mode `tele`.
        base_lr: its step size.
        shapes: shapes of the parameters and sizes of the symmetries, for `flat` only.
        max_size: trust region, Frobenius norm of a generator.
        max_stretch: trust region over the orbit, the largest factor by which all teleports that stay may stretch or
            shrink anything together; None for no bound.
        stays: in a mode with `tele`, learn a teleport that stays: the model moves along its orbit.
        gauge: in a mode with `tele`, learn a gauge for each tensor, undone after the step: `exact` along exact
            symmetries, `linearised` along pairs of linear layers too with what stands between taken as linear, or
            `none`.
        metric_memory: of the running mean that a gauge's metric is on minibatches (`LearnedGauge`), in [0, 1).
        secants: number of secant pairs that are built around the learned step where all data are seen.
        longest: the longest step in units of the joint curvature bound (`StepRule`), above one.
        cooling: how fast steps on minibatches get shorter once the loss is down to its noise (`StepRule`), or with time
            (`AdaptiveRule`); zero for not at all.
        update: in the modes that learn an update, its size: `coordinate` has an LSTM for every coordinate, `tensor` one
            for every tensor that steers a small network, for large models; `adaptive` has an LSTM for every tensor that
            steers Adam's direction and the gauge's, for minibatches. It builds no secants.

    Raises:
        ValueError: if the mode, the network or the gauge is unknown, `flat` has no shapes, or a mode with `tele` has
            neither teleport nor gauge.
    """

    mode: Mode = "lr+tele"
    network: Literal["equivariant", "flat"] = "equivariant"
    hidden: int = 32
    coordinate_hidden: int = 20
    groups: tuple[str, ...] = ("GL", "diagonal", "O")
    base: str = "sgd"
    base_lr: float = 1e-3
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    max_size: float = 100.0
    max_stretch: float | None = None
    stays: bool = True
    gauge: GaugeKind = "none"
    metric_memory: float = 0.95
    secants: int = 0
    longest: float = 1.5
    cooling: float = 0.0
    update: UpdateSize = "coordinate"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"a mode is one of {', '.join(MODES)}; not {self.mode!r}")
        if self.network not in ("equivariant", "flat"):
            raise ValueError(f"a network is equivariant or flat, not {self.network!r}")
        if self.network == "flat" and not self.shapes:
            raise ValueError("the flat networks are made for one shape: give the shapes of the parameters")
        if not 1 < self.longest < float("inf"):
            raise ValueError(f"longest is a number above one, the step that training starts at; not {self.longest!r}")
        if not 0 <= self.cooling < float("inf"):
            raise ValueError(f"cooling is a rate, zero for none; not {self.cooling!r}")
        if not 0 <= self.metric_memory < 1:
            raise ValueError(f"metric_memory lies between 0 and 1, one left out; not {self.metric_memory!r}")
        check_max_stretch(self.max_stretch)
        if self.max_stretch is not None and self.network == "flat":
            raise ValueError("the flat networks do not know where on the orbit they are: leave max_stretch out")
        if self.update not in UPDATES:
            raise ValueError(f"an update is one of {', '.join(UPDATES)}; not {self.update!r}")
        if self.gauge not in GAUGES:
            raise ValueError(f"a gauge is one of {', '.join(GAUGES)}; not {self.gauge!r}")
        if self.gauge != "none" and (self.network == "flat" or not self.steps):
            raise ValueError("a learned gauge goes with a learned step and the equivariant networks: use gauge='none'")
        if self.teleports and not self.stays and self.gauge == "none":
            raise ValueError(f"mode {self.mode!r} learns group elements: let the teleport stay, or give it a gauge")

    @property
    def teleports(self) -> bool:
        """Whether the mode learns the group element."""
        return self.mode == "tele" or self.mode.endswith("+tele")

    @property
    def steps(self) -> bool:
        """Whether the mode learns the step."""
        return self.mode != "tele"

    @property
    def gauge_groups(self) -> tuple[str, ...]:
        """Groups that a gauge may be of."""
        linearised = ("GL",) if self.gauge == "linearised" else ()
        return tuple(dict.fromkeys((*(group for group in self.groups if group != "O"), *linearised)))

    def without_teleport(self) -> MetaOptimizerConfig:
        """The same recipe without teleports: the mode's step alone."""
        return dataclasses.replace(self, mode="update" if self.mode.startswith("update") else "lr")


@dataclasses.dataclass(frozen=True)
class MetaState:
    """What a meta-optimizer remembers between steps.

    Args:
        progress: how each task is getting on.
        accepted: the last accepted point, where a step that made a task worse goes back to.
        teleporter: the teleporter's state.
        rule: the update rule's state.
        gauge: the learned gauge's state.
        stand_in: for the loss, where a rule divides by it and it is not known.
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
    """What one step gave; tensors are `(tasks,)`.

    Args:
        parameters: where to evaluate next, stacked.
        teleported: where the teleport led to, before the update; its start is in the state as `accepted`.
        state: the state after the step.
        evaluations: gradient evaluations beyond the one that gave the point.
        accepted: where the point was accepted; elsewhere the step started again from the last accepted one.
        moves: what each symmetry contributed to the teleport that stays; none without a teleporter.
        gauges: that the step was taken in, and that were undone.
        size: Frobenius norm of all generators of the teleport that stays together.
        refused: number of symmetries whose element was refused.
        stayed: where the task stays where it is, as its gradient or its step was not finite.
    """

    parameters: Tensors
    teleported: Tensors
    state: MetaState
    evaluations: Tensor
    accepted: Tensor
    moves: tuple[Move, ...]
    gauges: tuple[Gauge, ...]
    size: Tensor
    refused: Tensor
    stayed: Tensor


class MetaOptimizer(nn.Module):
    """Learns both the parameter update and the group element to move by.

    A step takes a point that has just been evaluated and answers with the parameters to evaluate next:

    1. accept the point or, task by task, go back to the last accepted one, with the step damped;
    2. teleport along the symmetries, gradients carried along;
    3. step each tensor in its gauge, within the curvature bound, and undo the gauge; a task whose step is not finite
       stays where it is.

    It is pure: networks are its parameters, all else is in the state. `LearnedOptimizer` wraps it for models,
    `DifferentiableLearnedOptimizer` for `higher`.

    What the networks read is kept out of the graph. Only tests of the gradient itself set `detach` to False, here, in
    the teleporter and in the rule.

    Args:
        config: its shape.

    Example:
        >>> meta = MetaOptimizer(MetaOptimizerConfig(mode="lr", hidden=4))
        >>> sum(p.numel() for p in meta.parameters()) < 1000
        True
    """

    def __init__(self, config: MetaOptimizerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MetaOptimizerConfig()
        self.detach = True
        region = TrustRegion(max_size=config.max_size)
        self.teleporter: Teleporter | None = None
        self.rule: UpdateRule
        self.gauge: LearnedGauge | None = None
        if config.teleports and config.gauge != "none":
            self.gauge = LearnedGauge(config.gauge_groups, config.hidden, config.metric_memory)
        if config.teleports and config.stays:
            self.teleporter = (
                FlatTeleporter(config.shapes, config.hidden, region)
                if config.network == "flat"
                else LearnedTeleporter(
                    config.groups, config.hidden, trust_region=region, max_stretch=config.max_stretch
                )
            )
        if not config.steps:
            self.rule = BaseRule(config.base, config.base_lr)
        elif config.network == "flat":
            self.rule = FlatRule(config.shapes, config.hidden, per_coordinate=config.mode.startswith("update"))
        elif config.mode.startswith("update") and config.update == "adaptive":
            self.rule = AdaptiveRule(config.hidden, config.cooling)
        elif config.mode.startswith("update") and config.update == "tensor":
            self.rule = TensorRule(
                config.hidden, secants=config.secants, longest=config.longest, cooling=config.cooling
            )
        elif config.mode.startswith("update"):
            self.rule = CoordinateRule(
                config.hidden, config.coordinate_hidden, config.secants, config.longest, config.cooling
            )
        else:
            self.rule = StepRule(config.hidden, config.secants, config.longest, config.cooling)

    @property
    def reads_symmetries(self) -> bool:
        """Whether it makes use of a model's symmetries: to move along, or as what tells which layer follows which."""
        return self.teleporter is not None or self.gauge is not None or self.rule.divides_by_loss

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
            teleporter: takes the place of the learned one (attribution).
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
    ) -> Step:
        """One inner step on every task of the stack.

        Args:
            point: just evaluated at the parameters that the last step gave.
            symmetries: of the model, in the order of the data flow.
            state: what `initial_state` or the last step gave.
            teleporter: takes the place of the learned one (attribution).
            regauge: exchanges the learned gauges for others (attribution).
            loss_known: whether the point's loss is that of this evaluation. If not, it has the tasks' shape and says
                nothing: every point is accepted, and no network reads it.
            loss_fits: whether the gradients are those of that loss. If not, a rule that divides by the loss is given a
                stand-in.
            along: those of the symmetries to move along and to step in gauges of; all of them if not given. The others
                tell how the layers follow one another.
            spend: whether `state` is not read again, so that the rule may overwrite its tensors; without a graph.

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
        if state.accepted is not None and not bool(accepted.all()):
            # The only task's own point may be of a batch of another size.
            one = accepted.numel() == 1
            base = state.accepted if one else point.choose(accepted, state.accepted)
        teleporter_state = chosen.judged(state.teleporter, progress, accepted)
        usable = _finite(base)
        start = base if bool(usable.all()) else _emptied(base, ~usable)
        along = symmetries if along is None else along
        moved, moves = start, list[Move]()
        if along and not isinstance(chosen, NoTeleport):
            moved, moves, teleporter_state = travel(chosen, start, along, teleporter_state, allowed=accepted & usable)
        rule_state = self.rule.carry(state.rule, moves, start, accepted)
        gauges, gauge_state = self._gauges(moved, along, progress, state, moves)
        if regauge is not None:
            gauges = regauge(gauges)
        parameters, rule_state = self.rule.step(moved, symmetries, progress, rule_state, gauges, spend)
        parameters, finite = _where_finite(parameters, base, usable)
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
            size=sum((move.size.square() for move in moves), zero).sqrt(),
            refused=sum((move.refused.to(zero.dtype) for move in moves), zero),
            stayed=~finite,
        )

    def _linear(self, symmetries: Sequence[Symmetry]) -> tuple[Symmetry, ...]:
        return gauge_symmetries(symmetries, self.config.gauge == "linearised")

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


def _finite(point: Point) -> Tensor:
    """Where the loss and all gradients are finite, `(tasks,)`."""
    assert point.loss is not None
    return all_finite((point.loss, *point.gradients.values()), point.loss.ndim)


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
    finite = usable & all_finite(parameters.values(), usable.ndim)
    if bool(finite.all()):
        return parameters, finite
    chosen = {}
    for name, value in parameters.items():
        mask = finite.reshape(*finite.shape, *(1,) * (value.ndim - finite.ndim))
        chosen[name] = torch.where(mask, value, base.parameters[name])
    return chosen, finite
