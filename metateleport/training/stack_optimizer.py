"""A meta-optimizer over a stack of tasks as a `torch.optim` optimizer, which `higher` makes differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metateleport.families import TaskStack
from metateleport.families.probed import ProbedLosses
from metateleport.learned.meta_optimizer import InnerLoop, MetaOptimizer
from metateleport.teleporters import Teleporter

__all__ = ["StackOptimizer"]


class StackOptimizer(torch.optim.Optimizer):
    """A meta-optimizer over a `TaskStack`; its differentiable twin is registered with `higher`.

    Args:
        model: the stack.
        meta: the meta-optimizer.
        deterministic: whether every evaluation sees the same data.
        teleporter: replaces the learned one (for attribution).

    Attributes:
        loop: the inner loop.
        loss_known: whether the inner loop is told the losses. Without them no step is taken back.
        first_order: whether an unroll leaves the derivative of the inner gradients out of the meta-gradient.

    Example:
        >>> from torch import nn
        >>> from metateleport.families import Task
        >>> from metateleport.learned import MetaOptimizerConfig, StepSettings
        >>> x = torch.ones(4, 2)
        >>> stack = TaskStack([Task(nn.Linear(2, 1), nn.functional.mse_loss, (x,), (x[:, :1],))])
        >>> optimizer = StackOptimizer(stack, MetaOptimizer(MetaOptimizerConfig(StepSettings(hidden=4), teleport=None)))
        >>> optimizer.step(lambda: stack(stack.full, probe=True)).shape
        torch.Size([1])
    """

    def __init__(
        self, model: TaskStack, meta: MetaOptimizer, deterministic: bool = True, teleporter: Teleporter | None = None
    ) -> None:
        super().__init__(list(model.parameters()), {})
        self.model = model
        self.loop = InnerLoop(meta, model.symmetries, deterministic, teleporter)
        self.loss_known = True
        self.first_order = False

    def step(self, closure: Callable[[], ProbedLosses] | None = None) -> Tensor:  # type: ignore[override]
        """One step on every task.

        Args:
            closure: evaluates the stack with `probe=True` and returns the result; no backward pass is needed.

        Returns:
            The losses before the step, `(tasks,)`.

        Raises:
            RuntimeError: without a closure.
            TypeError: if the closure returns anything else, losses alone for example.
            ValueError: if it evaluates another stack.
        """
        if closure is None:
            raise RuntimeError("the step of a stack needs a closure that returns stack(batch, probe=True)")
        with torch.enable_grad():
            given = closure()
        tensors = self.model.tensors()
        seen = ProbedLosses.checked(given, {name: tensors[name] for name in self.model.names})
        with torch.no_grad():
            point = seen.point(in_graph=False)
            # Copied, because the point is kept while the parameters are overwritten.
            point = point.update({name: value.clone() for name, value in point.parameters.items()})
            self.model.load(self.loop.advance(point, self.loss_known).parameters)
        return seen.losses.detach()
