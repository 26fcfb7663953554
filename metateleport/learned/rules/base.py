"""The interface of update rules, which turn gradients into a step, and the hand-designed rules."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from metateleport.gauges import Gauge
from metateleport.learned.parts import GaugeSettings, TeleportSettings
from metateleport.learned.progress import Progress, Tolerance
from metateleport.learned.teleporter import LearnedTeleporter
from metateleport.linalg import fit
from metateleport.point import Point, Tensors
from metateleport.settings import POSITIVE, Settings, SettingsError, setting
from metateleport.symmetries import Symmetry
from metateleport.symmetries.base import Kind
from metateleport.teleporters import Move, Teleporter

__all__ = [
    "BASES",
    "BaseOptimizerSettings",
    "BaseRule",
    "Learns",
    "RuleSettings",
    "UpdateRule",
    "carried_moments",
    "subtracted",
]

Base = Literal["sgd", "momentum", "adam"]
Learns = Literal["update", "lr", ""]

BASES: tuple[Base, ...] = get_args(Base)
"""Names of the hand-designed optimizers of mode `tele`."""


class UpdateRule(abc.ABC):
    """Turns a point into the parameters to evaluate next.

    `tolerance` says when steps on minibatches are taken back. `divides_by_loss` says whether the length of the steps
    depends on the loss; then a stand-in is used if the loss is not known. The state is a dict. `per_tensor` names its
    entries that are dicts by parameter name; `void_on_change` those that are dropped when other tensors are stepped
    than the time before; `void_on_growth` those that are made anew when a tensor is stepped for the first time.
    `rows_by_task` says that all weights are in linear layers and LSTM cells whose inputs have a row for each task, as
    `metateleport.learned.copies.Copies` takes them: then tasks can be followed side by side, each with networks of its
    own.
    """

    tolerance: ClassVar[Tolerance] = Tolerance()
    divides_by_loss: ClassVar[bool] = False
    reads_factors: ClassVar[bool] = False
    """Whether it steps the factors of exact symmetries in gauges; it asks for their weights and for no pass."""
    reads_pass: ClassVar[bool] = True
    """Whether steps without gauges may read the point's activations and cotangents."""
    per_tensor: ClassVar[tuple[str, ...]] = ()
    void_on_change: ClassVar[tuple[str, ...]] = ()
    void_on_growth: ClassVar[tuple[str, ...]] = ()
    rows_by_task: ClassVar[bool] = False

    @abc.abstractmethod
    def initial_state(self, point: Point) -> Any:
        """The state before the first step."""

    @abc.abstractmethod
    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: Any,
        gauges: Sequence[Gauge] = (),
        spend: bool = False,
    ) -> tuple[Tensors, Any]:
        """The next parameters and the new state.

        Args:
            point: where the model stands after its teleport, gradients carried along; one task dimension in front.
            symmetries: the model's symmetries, which give the order of the layers.
            progress: how each task is getting on.
            state: what `initial_state` or the last call gave.
            gauges: the gauges to step the tensors in; hand-designed rules ignore them.
            spend: whether the memory of `state` may be reused and the point's gradients dropped from it, as nobody
                reads them again; only without a graph.
        """

    def carry(self, state: Any, moves: Sequence[Move], point: Point, accepted: Tensor, spend: bool = False) -> Any:
        """Carries the state along with a teleport; by default there is nothing to carry.

        Args:
            state: the result of `initial_state` or of the last call of `step`.
            moves: the teleport.
            point: where it starts.
            accepted: where the last step was accepted, `(tasks,)`; elsewhere it was taken back.
            spend: whether the memory of `state` may be reused, as in `step`.
        """
        return state


@dataclasses.dataclass(frozen=True)
class RuleSettings(Settings, abc.ABC):
    """The settings of an update rule, which build it; `metateleport.learned.rules.registry` has them by their `kind`.

    A new rule needs a subclass of `UpdateRule`, and a subclass of this one with a `kind` of its own and the settings as
    fields.
    """

    part: ClassVar[str] = "rule"
    kind: ClassVar[str] = ""

    @property
    def reads_total(self) -> bool:
        """Whether the rule makes its steps shorter itself where the length of the run is told."""
        return False

    @property
    def starts_well(self) -> bool:
        """Whether untrained networks are a good optimizer, and are kept where training finds no better ones."""
        return False

    @property
    def learns(self) -> Learns:
        """What the rule learns: an `update` of every coordinate, a step for each tensor (`lr`), or nothing."""
        return "update"

    @abc.abstractmethod
    def rule(self) -> UpdateRule:
        """The rule, with new weights."""

    def teleporter(self, teleport: TeleportSettings, groups: tuple[str, ...]) -> Teleporter:
        """The teleporter that goes with it, with new weights.

        Args:
            teleport: the teleporter's settings.
            groups: names of the groups to have networks for.
        """
        return LearnedTeleporter(groups, teleport.hidden, max_stretch=teleport.max_stretch)

    def check(self, teleport: TeleportSettings | None, gauge: GaugeSettings | None) -> None:
        """Checks that the rule goes with the other parts of a meta-optimizer.

        Raises:
            SettingsError: if not; the message names the two settings.
        """

    def table(self) -> dict[str, Any]:
        return {"kind": self.kind, **super().table()}


@dataclasses.dataclass(frozen=True)
class BaseOptimizerSettings(RuleSettings):
    """A hand-designed optimizer after a learned teleport (`BaseRule`).

    Args:
        optimizer: `sgd`, `momentum` or `adam`.
        lr: step size.
    """

    kind: ClassVar[str] = "base"

    optimizer: Base = setting("sgd")
    lr: float = setting(1e-3, POSITIVE, 1e6)

    @property
    def learns(self) -> Learns:
        return ""

    def rule(self) -> BaseRule:
        return BaseRule(self.optimizer, self.lr)

    def check(self, teleport: TeleportSettings | None, gauge: GaugeSettings | None) -> None:
        if gauge is not None:
            raise SettingsError(
                f"gauge.kind = {gauge.kind!r} does not go with rule.kind = 'base', which ignores gauges: leave "
                "the gauge out"
            )
        if teleport is None:
            raise SettingsError("rule.kind = 'base' learns no step, and without teleport nothing is learned: add it")


@dataclasses.dataclass(frozen=True)
class BaseRule(UpdateRule):
    """A hand-designed optimizer on a stack of tasks: the update rule of mode `tele`.

    It takes the steps of `torch.optim.SGD` (with momentum) and `torch.optim.Adam`, differentiably and times the task's
    damping. A task that goes back to its last accepted point starts without momentum, as the momentum was moved on.

    Args:
        optimizer: `sgd`, `momentum` or `adam`.
        lr: step size.

    Raises:
        ValueError: if the optimizer is unknown or the step size not positive.
    """

    per_tensor: ClassVar[tuple[str, ...]] = ("momentum", "squares")
    rows_by_task: ClassVar[bool] = True

    optimizer: str = "sgd"
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.optimizer not in BASES:
            raise ValueError(f"a base optimizer is one of {', '.join(BASES)}; not {self.optimizer!r}")
        if not self.lr > 0:
            raise ValueError(f"the base optimizer's step size has to be positive, not {self.lr!r}")

    def initial_state(self, point: Point) -> dict[str, Any]:
        moments = {name: torch.zeros_like(gradient) for name, gradient in point.gradients.items()}
        return {"momentum": moments, "squares": moments, "time": 0}

    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge] = (),
        spend: bool = False,
    ) -> tuple[Tensors, dict[str, Any]]:
        time = state["time"] + 1
        momentum, squares, moved = {}, {}, dict(point.parameters)
        for name, gradient in point.gradients.items():
            kept = torch.where(fit(progress.accepted, gradient), state["momentum"][name], 0.0)
            if self.optimizer == "adam":
                momentum[name] = 0.9 * kept + 0.1 * gradient
                squares[name] = 0.999 * state["squares"][name] + 0.001 * gradient.square()
                # The root's derivative is infinite at zero: a gradient of exactly zero would give a NaN.
                root = (squares[name] / (1 - 0.999**time) + 1e-30).sqrt()
                direction = momentum[name] / (1 - 0.9**time) / (root + 1e-8)
            elif self.optimizer == "momentum":
                momentum[name] = 0.9 * kept + gradient
                squares[name], direction = state["squares"][name], momentum[name]
            else:
                momentum[name], squares[name], direction = state["momentum"][name], state["squares"][name], gradient
            moved[name] = point.parameters[name] - fit(self.lr * progress.damping, gradient) * direction
        return moved, {"momentum": momentum, "squares": squares, "time": time}

    def carry(
        self, state: dict[str, Any], moves: Sequence[Move], point: Point, accepted: Tensor, spend: bool = False
    ) -> dict[str, Any]:
        return {**state, **carried_moments(state, moves, point, False, spend)}


def carried_moments(
    state: dict[str, Any], moves: Sequence[Move], point: Point, detach: bool, spend: bool = False
) -> dict[str, Any]:
    """Momentum and second moments carried along with a teleport; with `spend` in place."""
    moments = {key: dict(state[key]) for key in ("momentum", "squares")}
    kinds: tuple[tuple[str, Kind], ...] = (("momentum", "covectors"), ("squares", "squares"))
    for move in moves:
        element, symmetry = (move.element.detach() if detach else move.element), move.symmetry
        for key, kind in kinds:
            multipliers = symmetry.multipliers(element, kind) if spend else None
            if multipliers is not None:
                for name in multipliers.keys() & moments[key].keys():
                    moments[key][name].mul_(multipliers[name])
                continue
            carry = symmetry.carry_covectors if kind == "covectors" else symmetry.carry_squares
            carried = dict(carry(element, moments[key], point).tensors)
            if not spend:
                moments[key].update(carried)
            while spend and carried:
                # One after the other, so that none is left when the next ones are made.
                name, value = carried.popitem()
                moments[key][name].copy_(value)
                del value
    return moments


def subtracted(parameters: Tensors, changes: Tensors) -> Tensors:
    return {name: parameters[name] - change for name, change in changes.items()}
