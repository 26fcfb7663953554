"""Training runs with teleports, measured at some of their steps, for the experiment `optimizers`."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.families import Task
from metateleport.families.stack import Batch
from metateleport.optim import TeleportingOptimizer
from metateleport.papers.experiments.base import LARGEST, finite
from metateleport.papers.experiments.contenders import Contender
from metateleport.papers.experiments.ways import Method
from metateleport.teleporters import TeleportReport, teleport

__all__ = ["Course", "follow"]


@dataclasses.dataclass(frozen=True)
class Course:
    """One training run at its checkpoints; a loss that is not finite stands as 1e300 from there on.

    Args:
        training: loss on all of the training data.
        held_out: loss on the held-out data.
        evaluations: gradient evaluations spent up to each checkpoint, those of the teleports included.
        seconds: CPU time spent in steps and teleports; CPU time, as it depends less on a busy machine.
        moved: number of teleports that moved the weights.
        refused: number that were refused.
        failures: how often each failure of a teleport was seen.
        growth: factor of the gradient norm in a teleport, on its minibatch; geometric mean.
        size: mean norm of the generators of a teleport, or of its displacement where there are no generators.
        jump: factor of the held-out loss in a teleport; geometric mean.
    """

    training: list[float]
    held_out: list[float]
    evaluations: list[float]
    seconds: list[float]
    moved: int
    refused: int
    failures: dict[str, int]
    growth: float
    size: float
    jump: float


def follow(
    task: Task,
    training: Batch,
    batches: Sequence[Batch],
    contender: Contender,
    step_size: float,
    method: Method,
    checkpoints: Sequence[int],
) -> Course:
    """Trains a task's model once.

    Args:
        task: gives the model at its start, the loss and the data; its model is trained.
        training: all of its training data.
        batches: the minibatch of each step.
        contender: the optimizer.
        step_size: its step size.
        method: how to teleport.
        checkpoints: numbers of steps after which to measure, in order; 0 is the start.
    """
    with warnings.catch_warnings():
        # What becomes of a state that cannot be carried is told of each method in words.
        warnings.filterwarnings("ignore", "the state")
        return _follow(_Run(task, contender.make(task.model, step_size), method), training, batches, checkpoints)


def _follow(run: _Run, training: Batch, batches: Sequence[Batch], checkpoints: Sequence[int]) -> Course:
    seen = _Seen()
    for step in range(checkpoints[-1] + 1):
        if step in checkpoints:
            spent = step + sum(report.evaluations for report in run.reports)
            seen.add(_loss(run.task, training), run.held_out(), spent, run.seconds)
        if step == checkpoints[-1] or seen.diverged:
            break
        run.step(step, batches[step])
    moved = [report for report in run.reports if report.size > 0]
    missing = len(checkpoints) - len(seen.training)
    return Course(
        training=seen.training + seen.training[-1:] * missing,
        held_out=seen.held_out + seen.held_out[-1:] * missing,
        evaluations=seen.evaluations + seen.evaluations[-1:] * missing,
        seconds=seen.seconds + seen.seconds[-1:] * missing,
        moved=len(moved),
        refused=sum(not report.accepted for report in run.reports),
        failures=dict(Counter(name for report in run.reports for name in report.failures)),
        growth=_mean_ratio([(each.gradient_norm_before, each.gradient_norm_after) for each in moved]),
        size=sum(report.size for report in moved) / len(moved) if moved else 0.0,
        jump=_mean_ratio([(each.held_out_before, each.held_out_after) for each in moved]),
    )


class _Run:
    """A model in training, with its optimizer and its teleports."""

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, method: Method) -> None:
        self.task, self.method = task, method
        self.seconds, self._looking = 0.0, 0.0
        self.optimizer: Any = optimizer
        self.reports: Sequence[TeleportReport] = ()
        self._between: Callable[[int, Batch], None] | None = None
        if method.teleporter is None:
            return
        teleporter = method.teleporter(task.seed)
        if teleporter.needs_loss:
            reports: list[TeleportReport] = []
            self.reports = reports

            def between(step: int, batch: Batch) -> None:
                """Teleports that evaluate the loss at other weights come between two steps of the optimizer."""
                assert method.schedule is not None
                if method.schedule.due(step):
                    held_out = self.held_out()
                    report = teleport(task.model, teleporter, batch[0], self._loss_on(batch))
                    reports.append(
                        dataclasses.replace(report, held_out_before=held_out, held_out_after=self.held_out())
                    )
                    if report.size > 0:
                        optimizer.state.clear()

            self._between = between
            return
        self.optimizer = TeleportingOptimizer(
            optimizer,
            task.model,
            teleporter,
            method.symmetries(task.model),
            schedule=method.schedule,
            state=method.state,
            held_out=self.held_out,
            # As in the papers that are tested here: nothing bounds the orbit.
            max_stretch=None,
        )
        self.reports = self.optimizer.reports

    def held_out(self) -> float:
        start = time.process_time()
        try:
            return _loss(self.task, self.task.held_out)
        finally:
            self._looking += time.process_time() - start

    def step(self, number: int, batch: Batch) -> None:
        start, looking = time.process_time(), self._looking
        if self._between is not None:
            self._between(number, batch)
        inputs, loss_on = batch[0], self._loss_on(batch)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_on(self.task.model(*inputs))
            loss.backward()
            return loss

        self.optimizer.step(closure)
        self.seconds += time.process_time() - start - (self._looking - looking)

    def _loss_on(self, batch: Batch) -> Callable[[Any], Tensor]:
        return lambda outputs: self.task.loss(outputs, *batch[1])


@dataclasses.dataclass
class _Seen:
    training: list[float] = dataclasses.field(default_factory=list)
    held_out: list[float] = dataclasses.field(default_factory=list)
    evaluations: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def diverged(self) -> bool:
        return max(self.training[-1], self.held_out[-1]) >= LARGEST

    def add(self, training: float, held_out: float, evaluations: float, seconds: float) -> None:
        self.training.append(training)
        self.held_out.append(held_out)
        self.evaluations.append(evaluations)
        self.seconds.append(seconds)


def _mean_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Geometric mean of second over first, over the pairs where it is one; 1 where there are none."""
    logs = [math.log(after / before) for before, after in pairs if 0 < before < LARGEST and 0 < after < LARGEST]
    return finite(math.exp(sum(logs) / len(logs))) if logs else 1.0


def _loss(task: Task, data: Batch | None) -> float:
    assert data is not None
    inputs, targets = data
    with torch.no_grad():
        value = float(task.loss(task.model(*inputs), *targets))
    return finite(value if math.isfinite(value) else math.inf)
