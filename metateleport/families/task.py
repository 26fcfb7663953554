"""Tasks: one optimisation problem each, the seeds that keep them apart, and stacks of them."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from metateleport.families.stack import Batch, StackedModel
from metateleport.symmetries import Symmetry

__all__ = ["SPLITS", "TRAINING_LOSS", "Measure", "Split", "Task", "TaskStack", "split_of", "task_seed"]

Split = Literal["train", "validation", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "validation", "held-out")

TRAINING_LOSS = "training loss"
"""What tasks are judged by, unless they name another measure."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a task is judged by, where that is not its training loss: smaller is better.

    Args:
        name: as tables call it.
        function: maps parameters by name and `data` to a scalar; the same for all tasks of a family.
        data: the task's own, such as the matrix that is sought.

    Example:
        >>> Measure("distance", lambda parameters, x: (parameters["x"] - x).norm(), (torch.zeros(3),)).name
        'distance'
    """

    name: str
    function: Callable[..., Tensor]
    data: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """One optimisation problem: a model at its start, data and a loss.

    Args:
        model: the model at its initial weights.
        loss: maps the model's outputs and the targets to a scalar; the same for all tasks of a family.
        inputs: the training data's inputs, samples in dimension 0.
        targets: the training data's targets, samples in dimension 0.
        symmetries: symmetries of the model, in the order of the data flow.
        batch_size: samples a minibatch; None for the whole training set at every evaluation.
        seed: seeds the order of the minibatches.
        held_out: inputs and targets that are never trained on.
        score: maps outputs and targets to an accuracy between 0 and 1, where the task has one.
        measure: what methods are tuned and judged by, where that is not the loss on all of the training data.
        rows: numbers of the samples of `inputs` and `targets` that are this task's; None for all. Tasks that draw on
            one set of data share it so, instead of holding a copy each.
    """

    model: nn.Module
    loss: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    symmetries: Sequence[Symmetry] = ()
    batch_size: int | None = None
    seed: int = 0
    held_out: Batch | None = None
    score: Callable[..., Tensor] | None = None
    measure: Measure | None = None
    rows: Tensor | None = None

    @property
    def samples(self) -> int:
        """Number of training samples."""
        return len((self.inputs or self.targets)[0] if self.rows is None else self.rows)

    @property
    def training(self) -> Batch:
        """Inputs and targets of the whole training set."""
        return (self.inputs, self.targets) if self.rows is None else self._picked(self.rows)

    def batch(self, step: int) -> Batch:
        """The minibatch of one evaluation: shuffled epochs, a function of the task's seed and the step alone."""
        if self.batch_size is None:
            return self.training
        per_epoch = max(self.samples // self.batch_size, 1)
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        chosen = torch.from_numpy(order[place * self.batch_size : (place + 1) * self.batch_size])
        return self._picked(chosen if self.rows is None else self.rows[chosen])

    def _picked(self, rows: Tensor) -> Batch:
        return tuple(value[rows] for value in self.inputs), tuple(value[rows] for value in self.targets)


def task_seed(seed: int, split: Split, index: int) -> int:
    """The seed of one task of a family: tasks of different splits never share one.

    The last digit in base 4 is the split's, the rest a hash of `seed` and `index`.

    Args:
        seed: the run's seed.
        split: `train`, `validation` or `held-out`.
        index: number of the task in its split.

    Example:
        >>> {task_seed(0, split, 5) % 4 for split in SPLITS} == {0, 1, 2}
        True
    """
    if split not in SPLITS:
        raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {split!r}")
    if seed < 0 or index < 0:
        raise ValueError(f"seeds and task numbers are not negative: got seed {seed}, task {index}")
    # As one list of words, a seed of more than 32 bits would meet another seed's task.
    drawn = int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1, np.uint64)[0])
    # Torch's generator on the CPU reads the lower 32 bits only: the split's digit is among them.
    return (drawn >> 4) * 4 + SPLITS.index(split)


def split_of(seed: int) -> Split:
    """The split that the seed of a task belongs to.

    Args:
        seed: as `task_seed` makes it.

    Raises:
        ValueError: if the seed belongs to none.

    Example:
        >>> split_of(task_seed(0, "held-out", 5))
        'held-out'
    """
    if seed % 4 >= len(SPLITS):
        raise ValueError(f"seed {seed} belongs to no split: its remainder by 4 has to be 0, 1 or 2")
    return SPLITS[seed % 4]


class TaskStack:
    """Tasks of one shape side by side: a stacked model and stacked data.

    Args:
        tasks: tasks of one family and setting.
        device: where the stack lives.

    Raises:
        ValueError: if there is no task, or their shapes differ.
    """

    def __init__(self, tasks: Sequence[Task], device: torch.device | str = "cpu") -> None:
        if not tasks:
            raise ValueError("a stack needs at least one task")
        if any(_empty(task) for task in tasks):
            raise ValueError("a task has no training samples, and without any there is no loss: give it one at least")
        first = tasks[0]
        self.symmetries = _unfrozen(first.model, first.symmetries)
        self.model = StackedModel([task.model for task in tasks], first.loss, self.symmetries).to(device)
        self.tasks = tuple(tasks)
        self.device = torch.device(device)
        if any(_shapes(task) != _shapes(tasks[0]) for task in tasks):
            raise ValueError("only tasks of one shape can be stacked: their data differ in number or shape")
        self.score = tasks[0].score
        self.measure = tasks[0].measure
        self._sought: tuple[Tensor, ...] = ()
        if self.measure is not None:
            self._sought = self._stack([(task.measure.data, ()) for task in tasks if task.measure is not None])[0]

    def __len__(self) -> int:
        return len(self.tasks)

    @functools.cached_property
    def full(self) -> Batch:
        """Every task's training data, stacked when they are first asked for: on minibatches they may never be."""
        return self._stack([task.training for task in self.tasks])

    @functools.cached_property
    def held_out(self) -> Batch | None:
        """Every task's held-out data, stacked when they are first asked for; None where a task has none."""
        parts = [task.held_out for task in self.tasks if task.held_out is not None]
        return self._stack(parts) if len(parts) == len(self.tasks) else None

    @property
    def deterministic(self) -> bool:
        """Whether every evaluation sees the whole training set."""
        return self.tasks[0].batch_size is None

    def batch(self, step: int) -> Batch:
        """Every task's minibatch of one evaluation, stacked."""
        return self.full if self.deterministic else self._stack([task.batch(step) for task in self.tasks])

    def measured(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What every task is judged by at some parameters: its measure, or its full training loss, `(tasks,)`."""
        if self.measure is None:
            return self.model.losses_at(parameters, self.full)
        with torch.no_grad():
            return self.model.each(self.measure.function, {**self.model.fixed(), **parameters}, *self._sought)

    def _stack(self, batches: Sequence[Batch]) -> Batch:
        inputs, targets = (
            tuple(self._side_by_side(values) for values in zip(*part, strict=True))
            for part in zip(*batches, strict=True)
        )
        return inputs, targets

    def _side_by_side(self, values: Sequence[Tensor]) -> Tensor:
        """The tasks' tensors stacked; one that they share is not copied."""
        if all(value is values[0] for value in values):
            return values[0].to(self.device).expand(len(values), *values[0].shape)
        return torch.stack(tuple(values)).to(self.device)


def _unfrozen(model: nn.Module, symmetries: Sequence[Symmetry]) -> tuple[Symmetry, ...]:
    """The symmetries that move no frozen parameter; what is left out is said, once for each model's shape."""
    named = dict(model.named_parameters())
    kept, frozen = [], []
    for symmetry in symmetries:
        moved = [name for name in symmetry.parameters if name in named and not named[name].requires_grad]
        frozen.extend(moved)
        if not moved:
            kept.append(symmetry)
    if frozen:
        warnings.warn(
            f"{len(symmetries) - len(kept)} of {len(symmetries)} symmetries are left out: they move "
            f"{', '.join(dict.fromkeys(frozen))}, which the task froze",
            stacklevel=3,
        )
    return tuple(kept)


def _empty(task: Task) -> bool:
    if task.rows is not None:
        return not len(task.rows)
    return any(value.ndim and not len(value) for value in (*task.inputs, *task.targets))


def _shapes(task: Task) -> list[Any]:
    """What has to be equal in all tasks of a stack."""
    count = () if task.rows is None else (len(task.rows),)
    own = [[(*count, *value.shape[len(count) :]) for value in part] for part in (task.inputs, task.targets)]
    held_out = None if task.held_out is None else [[value.shape for value in part] for part in task.held_out]
    return [own, held_out, None if task.measure is None else [value.shape for value in task.measure.data]]
