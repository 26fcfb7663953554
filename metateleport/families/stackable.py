"""Checks that tasks can be stacked, before any work starts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from metateleport.families.task import Task
from metateleport.symmetries import Symmetry

__all__ = ["check_stackable", "movable"]


def check_stackable(tasks: Sequence[Task]) -> None:
    """Checks that tasks can be stacked and stepped.

    Raises:
        ValueError: if there is no task, one has no samples, no real weights or none to train, or their models or data
            differ in shape.

    Example:
        >>> check_stackable([])
        Traceback (most recent call last):
        ValueError: a stack needs at least one task
    """
    if not tasks:
        raise ValueError("a stack needs at least one task")
    if any(_empty(task) for task in tasks):
        raise ValueError("a task has no training samples, and without any there is no loss: give it one at least")
    parameters = [dict(task.model.named_parameters()) for task in tasks]
    for name, value in parameters[0].items():
        if is_lazy(value):
            raise ValueError(f"{name!r} has no shape yet: run lazy modules once, on the task's inputs, in sample()")
        if value.is_complex():
            raise ValueError(
                f"{name!r} is complex, and steps are learned for real weights: keep its real and imaginary parts in a "
                "real parameter and use torch.view_as_complex in forward()"
            )
    shapes = [{name: value.shape for name, value in own.items()} for own in parameters]
    if any(other != shapes[0] for other in shapes):
        raise ValueError("only models of one architecture can be stacked: their parameters differ in name or shape")
    trained = [{name for name, value in own.items() if value.requires_grad} for own in parameters]
    if any(other != trained[0] for other in trained):
        raise ValueError("only models with the same parameters frozen can be stacked: theirs differ in requires_grad")
    if not trained[0]:
        raise ValueError("there is nothing to train: the model has no parameter with requires_grad=True")
    if any(_data_shapes(task) != _data_shapes(tasks[0]) for task in tasks):
        raise ValueError("only tasks of one shape can be stacked: their data differ in number or shape")


def movable(model: nn.Module, symmetries: Sequence[Symmetry]) -> tuple[Symmetry, ...]:
    """The symmetries that move no frozen parameter; a warning names the frozen parameters of the others.

    Raises:
        ValueError: if a symmetry names a module or a parameter that the model does not have.
    """
    named = dict(model.named_parameters())
    modules = {name for name, _ in model.named_modules()}
    for symmetry in symmetries:
        missing = [name for name in symmetry.modules if name not in modules]
        missing += [name for name in symmetry.parameters if name not in named]
        if missing:
            raise ValueError(
                f"a symmetry names {missing[0]!r}, which the model does not have (a tied weight goes by its first name)"
            )
    kept, frozen = [], []
    for symmetry in symmetries:
        fixed = [name for name in symmetry.parameters if not named[name].requires_grad]
        frozen.extend(fixed)
        if not fixed:
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


def _data_shapes(task: Task) -> list[Any]:
    count = () if task.rows is None else (len(task.rows),)
    own = [[(*count, *value.shape[len(count) :]) for value in part] for part in (task.inputs, task.targets)]
    held_out = None if task.held_out is None else [[value.shape for value in part] for part in task.held_out]
    return [own, held_out, None if task.measure is None else [value.shape for value in task.measure.data]]
