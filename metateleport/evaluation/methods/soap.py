"""Optimizers that use whole matrices, with one optimizer for every task of a stack: SOAP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metateleport.evaluation.rival import Choice, Rival
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory
from metateleport.families import TaskStack

__all__ = ["RIVALS", "PerTask", "soap"]


class PerTask(Method):
    """An optimizer that uses whole matrices; every task of a stack has an optimizer of its own.

    A task whose gradients are not finite stays where it is.

    Args:
        name: name of the method.
        optimizer: makes an optimizer, called with one task's parameters and the settings.
        settings: keyword arguments of `optimizer`.

    Example:
        >>> PerTask("gd", torch.optim.SGD, lr=0.1).settings
        {'lr': 0.1}
    """

    def __init__(self, name: str, optimizer: Callable[..., torch.optim.Optimizer], **settings: Any) -> None:
        super().__init__(name, settings)
        self.optimizer = optimizer

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "optimizer": getattr(self.optimizer, "__qualname__", repr(self.optimizer))}

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        tensors = {name: value.detach() for name, value in stack.tensors().items()}
        tasks = [{name: value[task].clone() for name, value in tensors.items()} for task in range(len(stack))]
        optimizers = [self.optimizer(list(each.values()), **self.settings) for each in tasks]
        lost = [False] * len(stack)
        recorder = Recorder(stack, budget)
        for step in range(budget):
            point = stack.point_at(tensors, stack.batch(step))
            recorder.charge(1.0)
            for task, (own, optimizer) in enumerate(zip(tasks, optimizers, strict=True)):
                for name, value in own.items():
                    value.grad = point.gradients[name][task].clone()
                lost[task] = lost[task] or not all(bool(value.grad.isfinite().all()) for value in own.values())  # type: ignore[union-attr]
                if not lost[task]:
                    optimizer.step()
            tensors = {name: torch.stack([own[name] for own in tasks]) for name in tensors}
            recorder.record(tensors)
        return recorder.trajectory()


def soap(**settings: Any) -> Method:
    """SOAP of `pytorch_optimizer`, without weight decay.

    Raises:
        ImportError: if `pytorch_optimizer` is not installed.

    Source: Vyas et al., ICLR 2025 (arXiv 2409.11321).
    """
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise ImportError("soap needs pytorch_optimizer: pip install 'metateleport[second-order]'") from error
    return PerTask("soap", SOAP, weight_decay=0.0, **settings)


RIVALS = (
    Rival(
        "soap",
        soap,
        choices={"precondition_frequency": Choice((1, 10))},
        tasks=8,
        on_request=True,
        library="pytorch_optimizer",
        extra="second-order",
    ),
)
