"""Training runs with teleports at some of their steps, watched at checkpoints: what `optimizers` is made of."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.experiments.base import LARGEST, finite
from metateleport.families import Task
from metateleport.optim import TeleportingOptimizer
from metateleport.schedules import Schedule
from metateleport.stack import Batch
from metateleport.symmetries import BatchPair2024, Rescaling, Symmetry
from metateleport.teleporters import Teleporter, TeleportReport

__all__ = ["OPTIMIZERS", "Course", "Method", "Recipe", "batch_pairs", "follow", "rescalings"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer and the step sizes it is tried at.

    Args:
        make: makes it for a model, at a step size.
        source: the step size of the source's code.
        grid: what it is tuned over.
    """

    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    source: float
    grid: tuple[float, ...]


# The step sizes are those of the source's code on MNIST.
OPTIMIZERS: dict[str, Recipe] = {
    "sgd": Recipe(lambda model, lr: torch.optim.SGD(model.parameters(), lr), 1e-2, (1e-2, 3e-2, 0.1, 0.3)),
    "momentum": Recipe(
        lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9), 1e-3, (1e-3, 3e-3, 1e-2, 3e-2)
    ),
    "adagrad": Recipe(lambda model, lr: torch.optim.Adagrad(model.parameters(), lr), 1e-2, (3e-3, 1e-2, 3e-2, 0.1)),
    "rmsprop": Recipe(lambda model, lr: torch.optim.RMSprop(model.parameters(), lr), 1e-4, (3e-4, 1e-3, 3e-3, 1e-2)),
    "adam": Recipe(lambda model, lr: torch.optim.Adam(model.parameters(), lr), 1e-4, (1e-3, 3e-3, 1e-2, 3e-2)),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """How and when to teleport.

    Args:
        teleporter: makes the teleporter; None for the optimizer alone.
        symmetries: of a model, in the order of the data flow.
        schedule: before which steps.
        state: what becomes of the optimizer's state.
    """

    teleporter: Callable[[], Teleporter] | None = None
    symmetries: Callable[[nn.Module], Sequence[Symmetry]] = lambda _: ()
    schedule: Schedule | None = None
    state: str = "transport"


@dataclasses.dataclass(frozen=True)
class Course:
    """One training run at its checkpoints; a loss that is not finite stands as 1e300 from there on.

    Args:
        training: loss on all of the training data.
        held_out: loss on the held-out data.
        evaluations: gradient evaluations spent up to each checkpoint, those of the teleports included.
        seconds: of processor time spent in steps and teleports, so that a busy machine tells the same.
        moved: number of teleports that moved the weights.
        refused: number that were refused.
        failures: how often each failure of a teleport was seen.
        growth: of the gradient norm in a teleport, geometric mean.
    """

    training: list[float]
    held_out: list[float]
    evaluations: list[float]
    seconds: list[float]
    moved: int
    refused: int
    failures: dict[str, int]
    growth: float


def rescalings(model: nn.Module) -> list[Symmetry]:
    """The rescalings of a perceptron, exact on every batch."""
    return [Rescaling(model, first, second) for first, second in itertools.pairwise(_layers(model))]


def batch_pairs(model: nn.Module) -> list[Symmetry]:
    """GL between the layers of a perceptron in the form of 2024, exact on the minibatch it is taken on."""
    activation = next(module for module in model.modules() if isinstance(module, nn.LeakyReLU))
    return [BatchPair2024(model, first, second, activation) for first, second in itertools.pairwise(_layers(model))]


def follow(
    task: Task,
    training: Batch,
    batches: Sequence[Batch],
    recipe: Recipe,
    step_size: float,
    method: Method,
    checkpoints: Sequence[int],
) -> Course:
    """Trains a task's model once.

    Args:
        task: gives the model at its start, the loss and the data; its model is trained.
        training: all of its training data.
        batches: the minibatch of each step.
        recipe: the optimizer.
        step_size: its step size.
        method: how to teleport.
        checkpoints: after which numbers of steps to look, in order; 0 is the start.
    """
    model, seen = task.model, _Seen()
    optimizer: Any = recipe.make(model, step_size)
    reports: Sequence[TeleportReport] = ()
    if method.teleporter is not None:
        optimizer = TeleportingOptimizer(
            optimizer,
            model,
            method.teleporter(),
            method.symmetries(model),
            schedule=method.schedule,
            state=method.state,
        )
        reports = optimizer.reports
    seconds = 0.0
    for step in range(checkpoints[-1] + 1):
        if step in checkpoints:
            spent = step + sum(report.evaluations for report in reports)
            seen.add(_loss(task, training), _loss(task, task.held_out), spent, seconds)
        if step == checkpoints[-1] or seen.diverged:
            break
        start = time.process_time()
        _step(optimizer, task, batches[step])
        seconds += time.process_time() - start
    growth = [report.gradient_norm_after / report.gradient_norm_before for report in reports if report.size > 0]
    logs = [math.log(each) for each in growth if math.isfinite(each) and each > 0]
    missing = len(checkpoints) - len(seen.training)
    return Course(
        training=seen.training + seen.training[-1:] * missing,
        held_out=seen.held_out + seen.held_out[-1:] * missing,
        evaluations=seen.evaluations + seen.evaluations[-1:] * missing,
        seconds=seen.seconds + seen.seconds[-1:] * missing,
        moved=len(growth),
        refused=sum(not report.accepted for report in reports),
        failures=dict(Counter(name for report in reports for name in report.failures)),
        growth=finite(math.exp(sum(logs) / len(logs))) if logs else 1.0,
    )


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


def _step(optimizer: Any, task: Task, batch: Batch) -> None:
    inputs, targets = batch

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(task.model(*inputs), *targets)
        loss.backward()
        return loss

    optimizer.step(closure)


def _loss(task: Task, data: Batch | None) -> float:
    assert data is not None
    inputs, targets = data
    with torch.no_grad():
        value = float(task.loss(task.model(*inputs), *targets))
    return finite(value if math.isfinite(value) else math.inf)


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
