"""One truncated unroll: inner steps in a graph, and the meta-loss along them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metateleport.families import TaskStack
from metateleport.learned.differentiable import unroll_context
from metateleport.learned.meta_optimizer import MetaOptimizer, MetaState
from metateleport.learned.stack_optimizer import StackOptimizer
from metateleport.training.cost import openness_of

__all__ = ["Unroll", "log_losses"]

_FLOOR = {torch.float64: 1e-26, torch.float32: 1e-12}


def log_losses(losses: Tensor, start: Tensor) -> Tensor:
    r"""$\log((L + \epsilon L_0) / L_0)$: scale-free, and level where the loss is down to rounding.

    Args:
        losses: `(steps, tasks)`.
        start: losses at the start of each task, `(tasks,)`.

    Returns:
        `(steps, tasks)`.

    Example:
        >>> log_losses(torch.tensor([[1.0]]), torch.tensor([1.0]))
        tensor([[0.]])
    """
    start = start.detach().abs().clamp_min(torch.finfo(losses.dtype).tiny)
    return (losses / start + _FLOOR.get(losses.dtype, 1e-12)).log()


@dataclasses.dataclass
class Unroll:
    """A stack of tasks on its way through several truncated windows of inner steps.

    Args:
        stack: the tasks; their parameters move along.
        meta: the meta-optimizer that is trained.
        first_order: leave the derivative of the inner gradients out of the meta-gradient.
        priced: keep the openness of teleports in the graph.

    After a window `openness` has how far each step's teleports and gauges were open, `(length, tasks)`; None where the
    meta-optimizer chooses no group element.
    """

    stack: TaskStack
    meta: MetaOptimizer
    first_order: bool = False
    priced: bool = False
    steps: int = 0
    start: Tensor | None = None
    state: MetaState | None = None
    openness: Tensor | None = None

    def window(self, length: int, track: bool = True) -> Tensor:
        """Takes some inner steps and returns the log losses after each, `(length, tasks)`, in the graph.

        The next window starts where this one ended, cut from its graph.

        Args:
            length: number of inner steps.
            track: keep the graph for the meta-gradient; without it nothing grows with the number of steps.
        """
        optimizer = StackOptimizer(self.stack.model, self.meta, self.stack.deterministic)
        optimizer.loop.state = self.state
        optimizer.first_order = self.first_order
        stays, opened = self.meta.teleporter is not None, []
        with unroll_context(self.stack.model, optimizer, track) as (model, differentiable):
            losses = [model(self.stack.batch(self.steps), probe=True)]
            if self.start is None:
                self.start = losses[0].detach()
            for _ in range(length):
                differentiable.step(losses[-1].sum())
                self.steps += 1
                taken = differentiable.loop.last_step
                assert taken is not None
                with torch.set_grad_enabled(track and self.priced):
                    opened.append(openness_of(taken, stays))
                if not track:
                    losses[-1] = losses[-1].detach()
                losses.append(model(self.stack.batch(self.steps), probe=True))
            moved = dict(zip(self.stack.model.names, model.fast_params, strict=True))
            assert differentiable.loop.state is not None
            self.state = differentiable.loop.state.map(Tensor.detach)
        self.stack.model.load(moved)
        found = [each for each in opened if each is not None]
        self.openness = torch.stack(found) if found else None
        return log_losses(torch.stack(losses[1:]), self.start)
