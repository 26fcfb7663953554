"""Gradient descent with whitening teleports: the hand-designed method that a learned teleport has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metateleport.evaluation.lost import LOST, where
from metateleport.evaluation.rival import Choice, Lattice, Rival
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory
from metateleport.families import TaskStack
from metateleport.gauges.step import Names, only_for, step_in_gauges, tensor_groups
from metateleport.learned.curvature import curvature_bounds
from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry
from metateleport.teleporters import WhiteningTeleporter, travel

__all__ = ["RIVALS", "VARIANTS", "Whitening"]

VARIANTS: dict[str, tuple[str, str]] = {
    "alternating": ("alternating", "in turn"),
    "gauge per tensor": ("undone", "all"),
    "gauges in turn": ("undone", "in turn"),
    "gauge of the upper layers": ("undone", "upper"),
    "features": ("features", "all"),
    "features, upper layers": ("features", "upper"),
    "balanced": ("balanced", "all"),
}
"""By name: the side that a teleport whitens, or `undone` for a gauge; and which tensors a step moves."""


class Whitening(Method):
    r"""Gradient descent that teleports to a whitening element before every step.

    Variants: `features` whitens the inputs of the upper layer of each pair; `balanced` makes both factors alike;
    `alternating` whitens the lower side and steps the upper layers, then the reverse. `gauge per tensor` steps each
    tensor in its whitening gauge and undoes the gauge, so that the model does not move along its orbit (for linear
    pairs that is ScaledGD); `gauges in turn` does so for the upper layers at one step and for the lower ones at the
    next. In variants that name the upper layers, only the teleport moves the lower ones.

    Gradients are carried along as covectors or rebuilt, and rebuilding is counted. Tensors that no symmetry moves take
    the same step.

    Args:
        lr: step size; if `relative`, a factor on the inverse of the layer's smooth curvature bound.
        variant: one of `VARIANTS`.
        relative: whether the step is relative to the curvature bound; tensors without a bound then take Polyak's step
            $L / |\nabla L|^2$.
        damping: the teleporter's damping, relative to the largest eigenvalue.

    Raises:
        ValueError: if the variant is unknown.

    Example:
        >>> Whitening(lr=0.5, variant="features").settings["relative"]
        True
    """

    teleports = True

    def __init__(
        self, lr: float, variant: str = "alternating", relative: bool = True, damping: float | None = None
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"a variant is one of {', '.join(VARIANTS)}; not {variant!r}")
        super().__init__("whitening", {"lr": lr, "variant": variant, "relative": relative, "damping": damping})
        self.lr, self.variant, self.relative, self.damping = lr, variant, relative, damping
        self.side, self.stepped = VARIANTS[variant]
        self.moves_by = "undone" if self.side == "undone" else "stays"

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        parameters = {name: value.detach() for name, value in stack.tensors().items()}
        recorder = Recorder(stack, budget)
        lost = torch.zeros(len(stack), dtype=torch.bool, device=stack.device)
        start: Tensor | None = None
        number, state = 0, None
        with torch.no_grad():
            while bool(recorder.affords().any()):
                batch = stack.batch(number)
                point = stack.point_at(parameters, batch)
                recorder.charge(1.0)
                assert point.loss is not None
                start = point.loss if start is None else start
                lost = lost | ~(point.loss <= LOST * start.abs())
                names = self._names(number, list(point.gradients), stack.symmetries)
                if self.side == "undone":
                    stepped = step_in_gauges(
                        point,
                        stack.symmetries,
                        lambda group: WhiteningTeleporter.for_group(group, self.damping),
                        lambda at, names: self._descend(at, names, stack.symmetries),
                        allowed=~lost,
                        names=names,
                    )
                    new, cost = stepped.parameters, stepped.evaluations
                else:
                    lean = only_for(point, names, stack.symmetries)
                    teleporter = WhiteningTeleporter(self.side, self.damping)  # type: ignore[arg-type]
                    arrived, moves, state = travel(teleporter, lean, stack.symmetries, state, allowed=~lost)
                    cost = sum((move.evaluations for move in moves), torch.zeros_like(point.loss))
                    recorder.drift(point.parameters, arrived.parameters, batch, where=~lost)
                    new = {**arrived.parameters, **self._descend(arrived, names, stack.symmetries)}
                recorder.charge(cost)
                lost = lost | ~_finite(new, len(stack))
                parameters = {name: where(lost, parameters[name], value) for name, value in new.items()}
                recorder.record(parameters)
                number += 1
        return recorder.trajectory()

    def _names(self, number: int, names: list[str], symmetries: tuple[Symmetry, ...]) -> Names:
        """The tensors that a step moves: all, or those of one side and those that no symmetry moves."""
        if self.stepped == "all":
            return tuple(names)
        sides = [(name, each.side(name)) for each in symmetries for name in each.parameters]
        wanted = "out" if self.stepped == "in turn" and number % 2 else "in"
        side = {name for name, found in sides if found in (wanted, "both")}
        free = {name for group in tensor_groups(names, symmetries) if not group.symmetries for name in group.names}
        return tuple(name for name in names if name in side | free)

    def _descend(self, point: Point, names: Names, symmetries: tuple[Symmetry, ...]) -> Tensors:
        assert point.loss is not None
        bounds: Tensors = {}
        reach: Any = 1.0
        if self.relative:
            bounds = curvature_bounds(point, symmetries)
            tiny = torch.finfo(point.loss.dtype).tiny
            reach = point.loss.abs() / point.squared_gradient_norm(frozenset(names)).clamp_min(tiny)
        stepped = {}
        for name in names:
            length = self.lr * (bounds[name].reciprocal() if name in bounds else reach)
            gradient = point.gradients[name]
            if isinstance(length, Tensor):
                length = length.reshape(-1, *(1,) * (gradient.ndim - 1))
            stepped[name] = point.parameters[name] - length * gradient
        return stepped


def _finite(parameters: Tensors, tasks: int) -> Tensor:
    return torch.stack([value.reshape(tasks, -1).isfinite().all(1) for value in parameters.values()]).all(0)


RIVALS = (
    Rival(
        "whitening",
        Whitening,
        # A step relative to the curvature bound is of order one.
        Lattice(-2, 1),
        choices={"variant": Choice(tuple(VARIANTS)), "relative": Choice((True, False))},
        tasks=16,
    ),
)
