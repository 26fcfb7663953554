"""First-order baselines on a stack of tasks: torch's own elementwise optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from metateleport.evaluation.rival import Rival
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory
from metateleport.families import TaskStack

__all__ = ["RIVALS", "FirstOrder"]


class FirstOrder(Method):
    """An elementwise optimizer of `torch.optim`, run on the stacked parameters.

    Every coordinate is updated independently, so a stack takes the same steps as each task alone.

    Args:
        name: name of the method.
        optimizer: makes the optimizer, called with the parameters and the settings.
        settings: keyword arguments of `optimizer`.

    Example:
        >>> FirstOrder("momentum", torch.optim.SGD, lr=0.01, momentum=0.9).settings
        {'lr': 0.01, 'momentum': 0.9}
    """

    def __init__(
        self, name: str, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **settings: Any
    ) -> None:
        super().__init__(name, settings)
        self.optimizer = optimizer

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "optimizer": getattr(self.optimizer, "__qualname__", repr(self.optimizer))}

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        own = copy.deepcopy(stack)
        optimizer = self.optimizer(own.parameters(), **self.settings)
        recorder = Recorder(stack, budget)
        for step in range(budget):
            optimizer.zero_grad()
            own(stack.batch(step)).sum().backward()
            optimizer.step()
            recorder.charge(1.0)
            recorder.record(own.tensors())
        return recorder.trajectory()


def _gd(**settings: Any) -> Method:
    return FirstOrder("gd", torch.optim.SGD, **settings)


def _momentum(**settings: Any) -> Method:
    return FirstOrder("momentum", torch.optim.SGD, momentum=0.9, **settings)


def _adam(**settings: Any) -> Method:
    return FirstOrder("adam", torch.optim.Adam, **settings)


RIVALS = (Rival("gd", _gd), Rival("momentum", _momentum), Rival("adam", _adam))
