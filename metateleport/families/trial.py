"""The first evaluation of a stack: models that cannot be evaluated are reported before any work starts."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from metateleport.capture import record
from metateleport.families.stack import TaskStack
from metateleport.families.task import Batch

__all__ = ["StackError", "check_evaluation", "check_second_order"]


class StackError(ValueError):
    """A stack whose tasks cannot be evaluated; the message names the cause and what to do."""


def check_evaluation(stack: TaskStack, batch: Batch) -> None:
    """Evaluates a stack and its gradients once, and leaves it as it was.

    A model that does not go through `torch.func.vmap` (recurrent layers, `.item()`, control flow that depends on data)
    is evaluated task by task from then on, with one warning.

    Args:
        stack: the stack; `batched` is set on it.
        batch: inputs and targets of every task, stacked.

    Raises:
        StackError: if a task does not run, its loss is not a real scalar, or a symmetry's module is not run.

    Example:
        >>> from torch import nn
        >>> from metateleport.families import Task
        >>> stack = TaskStack([Task(nn.Linear(2, 1), lambda outputs: outputs, (torch.ones(4, 2),), ())])
        >>> check_evaluation(stack, stack.full)
        Traceback (most recent call last):
        metateleport.families.trial.StackError: the loss has to be a scalar; its shape is (4, 1)
    """
    devices = [stack.device] if stack.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        _single(stack, batch)
        error = _failure(stack, batch)
        if error is None:
            return
        stack.batched = False
        again = _failure(stack, batch)
    if again is not None:
        stack.batched = True
        raise StackError(
            f"the tasks' model cannot be evaluated with its gradients: {_words(again)}. Batched over the tasks it "
            f"failed with: {_words(error)}"
        ) from again
    warnings.warn(
        f"the tasks are evaluated one by one, which is slow: torch.func.vmap cannot batch the model ({_words(error)}). "
        "It batches where recurrent cells are written with nn.Linear, and .item() or branches on data with torch.where",
        stacklevel=4,
    )


def check_second_order(stack: TaskStack, batch: Batch) -> None:
    """Differentiates a stack's gradients once, as meta-training does.

    Raises:
        StackError: if the model's operations have no second derivative.
    """
    devices = [stack.device] if stack.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            gradients = stack(batch, probe=True).point(in_graph=True).gradients
            total = sum(value.square().sum() for value in gradients.values())
            if isinstance(total, Tensor) and total.requires_grad:
                # All of the graph: towards some weights alone, a function that has one derivative only is left out.
                total.backward()
        except Exception as error:
            raise StackError(
                f"meta-training differentiates the gradients, and the model's cannot be: {_words(error)}. Use "
                "--set outer.first_order=true; or, in forward(), sdpa_kernel(SDPBackend.MATH) for attention and "
                "torch.backends.cudnn.flags(enabled=False) for recurrent layers"
            ) from error
        finally:
            stack.zero_grad()


def _single(stack: TaskStack, batch: Batch) -> None:
    """Runs the first task as its author would."""
    tensors = {name: value[0].detach().clone() for name, value in {**stack.fixed(), **stack.tensors()}.items()}
    inputs, targets = (tuple(value[0] for value in part) for part in batch)
    try:
        with torch.no_grad(), record(stack.template, stack.watched) as recording:
            outputs = torch.func.functional_call(stack.template, tensors, inputs)
    except Exception as error:
        raise StackError(f"the task's model does not run on the task's inputs: {_words(error)}") from error
    unused = [name for name in stack.watched if name not in recording.outputs]
    if unused:
        raise StackError(
            f"a symmetry of the task needs the module {unused[0]!r}, which forward() does not run: leave it out"
        )
    try:
        with torch.no_grad():
            loss = stack.loss(outputs, *targets)
    except Exception as error:
        raise StackError(f"the task's loss does not take its outputs and targets: {_words(error)}") from error
    if not isinstance(loss, Tensor):
        raise StackError(f"the loss has to be a tensor of one entry; it is of type {type(loss).__name__}")
    if loss.ndim:
        raise StackError(f"the loss has to be a scalar; its shape is {tuple(loss.shape)}")
    if not loss.is_floating_point():
        raise StackError(f"the loss has to be a real number; its dtype is {loss.dtype}")


def _failure(stack: TaskStack, batch: Batch) -> Exception | None:
    try:
        point = stack.point_at(stack.tensors(), batch)
    except Exception as error:
        return error
    assert point.loss is not None
    if point.loss.shape != (len(stack),):
        return RuntimeError(f"the losses are of shape {tuple(point.loss.shape)}, not one for each task")
    return None


def _words(error: Exception) -> str:
    """The first sentence of an error, on one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said.split('. ')[0][:200]}"
