"""Optimizers as people use them: any `torch.optim.Optimizer`, with a schedule to the end of the budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.evaluation.methods.schedule import Decay, factor
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory
from metateleport.families import TaskStack

__all__ = ["Make", "Scheduled"]

Make = Callable[..., torch.optim.Optimizer]
"""Makes an optimizer, called with a module and keyword arguments."""


class Scheduled(Method):
    """An optimizer with a schedule, one for a whole stack of tasks or one for every task.

    One optimizer serves a stack if it updates every coordinate, or every matrix of the last two dimensions, by itself.
    Any other gets one task's model at a time; the gradients are evaluated for all tasks at once all the same. A task
    whose gradients are not finite stays where it is, if tasks are stepped one by one.

    Args:
        name: name of the method.
        make: makes an optimizer, called with a module (the stack, whose parameters have a task dimension in front, or
            one task's model) and the settings.
        stacked: whether one optimizer serves the whole stack; or a function of the stack that says so.
        decay: the schedule, as in `factor`.
        settings: keyword arguments of `make`; one that ends in `_share` is a share of the budget, and its number of
            steps is passed under the name without it.

    Example:
        >>> made = Scheduled("gd", lambda model, **own: torch.optim.SGD(model.parameters(), **own), lr=0.1)
        >>> made.settings
        {'decay': 'constant', 'lr': 0.1}
    """

    def __init__(
        self,
        name: str,
        make: Make,
        stacked: bool | Callable[[nn.Module], bool] = True,
        decay: Decay = "constant",
        **settings: Any,
    ) -> None:
        super().__init__(name, {"decay": decay, **settings})
        self.make, self.decay = make, decay
        self._serves = stacked if callable(stacked) else lambda _: bool(stacked)

    def identity(self) -> dict[str, Any]:
        made = f"{self.make.__module__}.{getattr(self.make, '__qualname__', repr(self.make))}"
        return {**super().identity(), "make": made}

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        self.stacked = self._serves(stack)
        return self._stacked(stack, budget) if self.stacked else self._one_by_one(stack, budget)

    def _made(self, model: nn.Module, budget: int) -> _Driven:
        own = {}
        for name, value in self.settings.items():
            if name.endswith("_share"):
                own[name.removesuffix("_share")] = round(value * budget)
            elif name != "decay":
                own[name] = value
        return _Driven(self.make(model, **own), self.decay, budget)

    def _stacked(self, stack: TaskStack, budget: int) -> Trajectory:
        own = copy.deepcopy(stack)
        driven = self._made(own, budget)
        recorder = Recorder(stack, budget)
        for step in range(budget):
            driven.optimizer.zero_grad()
            own(stack.batch(step)).sum().backward()
            driven.step(step)
            recorder.charge(1.0)
            with recorder.untimed():
                found = driven.averaged(own.tensors)
            recorder.record(found)
        return recorder.trajectory()

    def _one_by_one(self, stack: TaskStack, budget: int) -> Trajectory:
        models = [_alone(stack, task) for task in range(len(stack))]
        own = [{name: dict(model.named_parameters())[name] for name in stack.names} for model in models]
        every = [self._made(model, budget) for model in models]
        buffers = {name: value for name, value in stack.tensors().items() if name not in stack.names}
        lost = [False] * len(stack)

        def tensors() -> dict[str, Tensor]:
            return {**{name: torch.stack([each[name].detach() for each in own]) for name in stack.names}, **buffers}

        recorder, at = Recorder(stack, budget), tensors()
        for step in range(budget):
            point = stack.point_at(at, stack.batch(step))
            recorder.charge(1.0)
            for task, (values, driven) in enumerate(zip(own, every, strict=True)):
                for name, value in values.items():
                    value.grad = point.gradients[name][task].clone()
                lost[task] = lost[task] or not _finite(list(values.values()))
                if not lost[task]:
                    driven.step(step)
            at = tensors()
            with recorder.untimed():
                found = _averaged_of(every, tensors, at)
            recorder.record(found)
        return recorder.trajectory()


class _Driven:
    """An optimizer whose step sizes follow a schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer, decay: Decay, budget: int) -> None:
        self.optimizer, self.decay, self.budget = optimizer, decay, budget
        self._largest = [group["lr"] for group in optimizer.param_groups]

    def step(self, number: int) -> None:
        now = factor(self.decay, number, self.budget)
        for group, largest in zip(self.optimizer.param_groups, self._largest, strict=True):
            group["lr"] = largest * now
        self.optimizer.step()

    @property
    def averages(self) -> bool:
        """Whether the optimizer judges itself by averages of its weights, as schedule-free ones do."""
        return callable(getattr(self.optimizer, "eval", None))

    def averaged(self, tensors: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What it is judged by: its weights, or their averages."""
        return _averaged_of([self], tensors, None)


def _averaged_of(
    every: Sequence[_Driven], tensors: Callable[[], dict[str, Tensor]], at: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    if not every[0].averages:
        return tensors() if at is None else at
    for each in every:
        each.optimizer.eval()  # type: ignore[attr-defined]
    found = {name: value.detach().clone() for name, value in tensors().items()}
    for each in every:
        each.optimizer.train()  # type: ignore[attr-defined]
    return found


def _alone(stack: TaskStack, task: int) -> nn.Module:
    """A task's model at its start, in a copy of its own, where the stack's parameters are."""
    model = copy.deepcopy(stack.tasks[task].model).to(stack.device)
    named, tensors = dict(model.named_parameters()), stack.tensors()
    with torch.no_grad():
        for name in stack.names:
            named[name].copy_(tensors[name][task])
    return model


def _finite(parameters: Sequence[Tensor]) -> bool:
    return all(bool(value.grad.isfinite().all()) for value in parameters if value.grad is not None)
