"""Adapts learn2learn's learners to all tasks of a stack at once, with one set of batched kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.families import Batch, TaskStack, stacked_name
from metateleport.fewshot.learn2learn import learn2learn
from metateleport.fewshot.learners import TeleportingLearner

__all__ = ["Adaptation", "adapt", "on_stack"]


def on_stack(learner: Any, stack: TaskStack) -> Any:
    """A clone of a learner for all tasks of a stack at once, in the graph of the learner's parameters.

    The clone's model is a `TaskStack` in which every task starts from the learner's weights. Called with a batch the
    clone returns the losses, `(tasks,)`, and its `adapt` takes their sum. Each task adapts as if it were alone;
    learning rates and preconditioners are shared.

    Args:
        learner: one of learn2learn's (MAML, MetaSGD, GBML), or a `TeleportingLearner`, around a single model.
        stack: tasks of that model; their own initial weights are not used.

    Returns:
        The clone.

    Raises:
        ValueError: if the tasks' model has other parameters than the learner's.

    Example:
        >>> from metateleport import Task
        >>> from metateleport.fewshot import maml
        >>> x = torch.ones(4, 1)
        >>> stack = TaskStack([Task(nn.Linear(1, 1), nn.functional.mse_loss, (x,), (y * x,)) for y in (1, 2, 3)])
        >>> learner = on_stack(maml(nn.Linear(1, 1), lr=0.1), stack)
        >>> learner.adapt(learner(stack.full).sum())
        >>> learner(stack.full).shape
        torch.Size([3])
    """
    clone = learner.clone()
    inner = clone.learner if isinstance(clone, TeleportingLearner) else clone
    named = dict(inner.module.named_parameters())
    trained = {name: value for name, value in named.items() if value.requires_grad}
    wanted = {name: value.shape[1:] for name, value in stack.tensors().items() if name in stack.names}
    if wanted != {name: value.shape for name, value in trained.items()}:
        raise ValueError("the tasks' model is not the learner's: their parameters differ in name or shape")
    stacked = learn2learn().clone_module(stack)
    for name, value in named.items():
        own = stacked._parameters if name in trained else stacked._buffers
        own[stacked_name(name)] = value.expand(len(stack), *value.shape)
    inner.module = stacked
    return clone


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Results of adapting to the tasks of a stack, before the first step and after every one, `(tasks, steps + 1)`.

    Args:
        support: loss on the support data.
        query: loss on the query data.
        accuracy: on the query data; None if the tasks have no score.
        evaluations: gradient evaluations spent.
        size: Frobenius norm of the generators of the teleport before the step, of all symmetries together,
            `(tasks, steps)`.
        refused: teleports that the trust region refused.
    """

    support: Tensor
    query: Tensor
    accuracy: Tensor | None
    evaluations: Tensor
    size: Tensor
    refused: int


def adapt(learner: Any, stack: TaskStack, steps: int) -> Adaptation:
    """Adapts to every task of a stack and measures after every step; measuring is not counted as spent.

    Args:
        learner: as for `on_stack`; it is left as it was.
        stack: tasks with held-out data.
        steps: of the inner loop.

    Raises:
        ValueError: if the tasks have no held-out data.
    """
    if stack.held_out is None:
        raise ValueError("adapting is measured on held-out data, and these tasks have none")
    clone = on_stack(learner, stack)
    rows = [_measured(clone, stack, stack.held_out)]
    spent = torch.zeros(len(stack), steps + 1)
    sizes = torch.zeros(len(stack), steps)
    refused = 0
    for step in range(steps):
        # Values alone are wanted, and in first order they are the same.
        clone.adapt(clone(stack.full).sum(), first_order=True)
        rows.append(_measured(clone, stack, stack.held_out))
        spent[:, step + 1] = spent[:, step] + 1.0
        if isinstance(clone, TeleportingLearner):
            spent[:, step + 1] = torch.as_tensor(clone.evaluations)
            refused += sum(int(move.refused.sum()) for move in clone.moves)
            squares = [move.size.double().square() for move in clone.moves]
            sizes[:, step] = sum(squares, start=torch.zeros(len(stack), dtype=torch.float64)).sqrt()
        _cut(clone)
    support, query, accuracy = (torch.stack(column, 1) for column in zip(*rows, strict=True))
    return Adaptation(support, query, None if stack.score is None else accuracy, spent, sizes, refused)


def _measured(clone: Any, stack: TaskStack, held_out: Batch) -> tuple[Tensor, Tensor, Tensor]:
    module: TaskStack = clone.module
    parameters = module.tensors()
    support = stack.losses_at(parameters, stack.full)
    query = stack.losses_at(parameters, held_out)
    if stack.score is None:
        return support, query, torch.full_like(query, float("nan"))
    outputs = stack.outputs(parameters, held_out[0])
    return support, query, stack.score(outputs, *held_out[1])


def _cut(clone: nn.Module) -> None:
    """Detaches the fast weights from their graph."""
    module: Any = clone.module
    for key, value in module._parameters.items():
        module._parameters[key] = value.detach().requires_grad_(value.requires_grad)
