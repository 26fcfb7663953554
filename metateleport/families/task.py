"""Tasks, one optimisation problem each, and the seeds that keep their splits apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from metateleport.symmetries import Symmetry

__all__ = ["SPLITS", "TRAINING_LOSS", "Batch", "Measure", "Split", "Task", "split_of", "task_seed"]

Batch = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Inputs of the model and targets of the loss."""

Split = Literal["train", "validation", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "validation", "held-out")

TRAINING_LOSS = "training loss"
"""The measure of tasks that name no other."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """The measure that a task is judged by, if that is not its training loss; smaller is better.

    Args:
        name: for tables.
        function: maps parameters by name and `data` to a scalar; the same for all tasks of a family.
        data: further arguments of `function`, such as the matrix that is sought.

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
        batch_size: samples per minibatch; None for the whole training set at every evaluation.
        seed: seeds the order of the minibatches.
        held_out: inputs and targets that are never trained on.
        score: maps outputs and targets to an accuracy between 0 and 1, where the task has one.
        measure: what methods are tuned and judged by, if that is not the loss on all of the training data.
        rows: indices of this task's samples in `inputs` and `targets`; None for all. With them many tasks share one
            set of data without copies.
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
        epoch, place = divmod(step, self.per_epoch)
        return self._picked(self.order(epoch)[place * self.batch_size : (place + 1) * self.batch_size])

    @property
    def per_epoch(self) -> int:
        """Number of minibatches until all samples have been seen."""
        return 1 if self.batch_size is None else max(self.samples // self.batch_size, 1)

    def order(self, epoch: int) -> Tensor:
        """The rows of `inputs` and `targets` in the order of one epoch, shuffled by the task's seed.

        Example:
            >>> task = Task(nn.Linear(1, 1), nn.functional.mse_loss, (torch.zeros(5, 1),), (torch.zeros(5, 1),))
            >>> sorted(task.order(3).tolist())
            [0, 1, 2, 3, 4]
        """
        order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(self.samples))
        return order if self.rows is None else self.rows[order]

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
