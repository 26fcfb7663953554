"""Gradient descent with teleports by gradient ascent, as in the source papers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metateleport.evaluation.lost import LOST, where
from metateleport.evaluation.rival import Choice, Rival
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory
from metateleport.families import TaskStack
from metateleport.teleporters import GradientAscentTeleporter, travel

__all__ = ["RIVALS", "SCHEDULES", "GradientAscent"]

SCHEDULES: dict[str, Callable[[int], bool]] = {
    "once, before step 0": lambda step: step == 0,
    "before every 10th step": lambda step: step % 10 == 0,
}
"""Schedules by name: a function of the step's number that says whether to teleport before the step."""


class GradientAscent(Method):
    r"""Gradient descent with teleports by gradient ascent on the squared gradient norm, as in the source papers.

    A teleport costs the gradient evaluations of its ascent steps. The gradient is carried along, so the step after the
    teleport needs no new one.

    Args:
        lr: step size of gradient descent.
        schedule: when to teleport, a key of `SCHEDULES`.
        ascent_steps: steps of each ascent.
        size: largest Frobenius norm of the generator; the first length of an ascent step is `size / ascent_steps`.

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), algorithm 1.
    """

    teleports = True
    moves_by = "stays"

    def __init__(
        self, lr: float, schedule: str = "once, before step 0", ascent_steps: int = 10, size: float = 1.0
    ) -> None:
        super().__init__(
            "gradient-ascent", {"lr": lr, "schedule": schedule, "ascent_steps": ascent_steps, "size": size}
        )
        self.lr, self.due = lr, SCHEDULES[schedule]
        self.teleporter = GradientAscentTeleporter(steps=ascent_steps, step_size=size / ascent_steps, cap=size)

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        parameters = {name: value.detach() for name, value in stack.tensors().items()}
        recorder = Recorder(stack, budget)
        lost = torch.zeros(len(stack), dtype=torch.bool, device=stack.device)
        start: Tensor | None = None
        step, state = 0, None
        while bool(recorder.affords().any()):
            batch = stack.batch(step)
            point = stack.point_at(parameters, batch)
            recorder.charge(1.0)
            assert point.loss is not None
            start = point.loss if start is None else start
            lost = lost | ~(point.loss <= LOST * start.abs())
            if self.due(step) and stack.symmetries:
                arrived, moves, state = travel(self.teleporter, point, stack.symmetries, state, allowed=~lost)
                for move in moves:
                    recorder.charge(move.evaluations)
                recorder.drift(point.parameters, arrived.parameters, batch, where=~lost)
                point = arrived
                if arrived.stale:
                    point = stack.point_at(arrived.parameters, batch)
                    recorder.charge(1.0)
            stepped = {
                name: value.detach() - self.lr * point.gradients[name] for name, value in point.parameters.items()
            }
            parameters = {name: where(lost, parameters[name], value) for name, value in stepped.items()}
            recorder.record(parameters)
            step += 1
        return recorder.trajectory()


RIVALS = (
    Rival(
        "gradient-ascent",
        GradientAscent,
        choices={"schedule": Choice(tuple(SCHEDULES)), "size": Choice((1.0, 3.0))},
        tasks=8,
    ),
)
