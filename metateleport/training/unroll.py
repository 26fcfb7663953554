"""One truncated unroll: inner steps in a graph, and the meta-loss along them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from metateleport.families import Batch, FamilyError, TaskStack
from metateleport.learned.meta_optimizer import MetaOptimizer, MetaState
from metateleport.point import Tensors
from metateleport.training.cost import Elements, elements_of, openness_along
from metateleport.training.differentiable import unroll_context
from metateleport.training.stack_optimizer import StackOptimizer

__all__ = ["Unroll", "log_losses", "runs_blind"]

_FLOOR = {torch.float64: 1e-26, torch.float32: 1e-12}


_TOGETHER = 10
"""Steps whose group elements are measured together, so that no more of them are kept."""


def log_losses(losses: Tensor, start: Tensor, scale: Tensor | None = None) -> Tensor:
    r"""$\log((L + \epsilon L_0) / L_0)$: scale-free, and level where the loss is down to rounding.

    A loss below zero has no logarithm. With $s$ the size of a decrease that counts,

    $$\log(\max(L, 0) / L_0 + \epsilon) + \operatorname{asinh}(\min(L, 0) / s) \quad (L_0 > 0), \qquad
      \operatorname{asinh}((L - L_0) / s) \quad (L_0 \le 0),$$

    which grows with the loss everywhere, so that of two runs of a task the one further down is the better, and is the
    logarithm as long as the loss stays positive. The second is blind to what is added to the loss.

    Args:
        losses: `(steps, tasks)`.
        start: losses at the start of each task, `(tasks,)`.
        scale: $s$, `(tasks,)`; the size of the first loss, or one where that is zero, if not given.

    Returns:
        `(steps, tasks)`.

    Example:
        >>> log_losses(torch.tensor([[1.0]]), torch.tensor([1.0]))
        tensor([[0.]])
    """
    start, tiny = start.detach(), torch.finfo(losses.dtype).tiny
    own = start.abs() if scale is None else scale.detach()
    own = torch.where(own.isfinite() & (own > tiny), own, torch.ones_like(own))
    positive = start.abs().clamp_min(tiny)
    logs = (losses.clamp_min(0.0) / positive + _FLOOR.get(losses.dtype, 1e-12)).log()
    below = start <= 0
    if not bool((below | (losses < 0)).any()):
        return logs
    return torch.where(below, ((losses - start) / own).asinh(), logs + (losses.clamp_max(0.0) / own).asinh())


def runs_blind(share: float, seed: int, stack: int, window: int) -> bool:
    """Whether a window of meta-training hides the losses, so that the networks learn to work without them.

    A share of the windows of every stack, spread evenly; where they begin is drawn from the seed and the stack, so
    that a run that goes on after an interruption hides the same.

    Args:
        share: share of such windows, in [0, 1].
        seed: of the training.
        stack: its number.
        window: its number on the stack.

    Example:
        >>> [runs_blind(0.5, 0, 3, window) for window in range(4)]
        [True, False, True, False]
    """
    begin = float(np.random.default_rng([seed, stack]).random())
    return math.floor(begin + share * (window + 1)) > math.floor(begin + share * window)


@dataclasses.dataclass
class Unroll:
    """A stack of tasks on its way through several truncated windows of inner steps.

    Args:
        stack: the tasks; their parameters move along.
        meta: the meta-optimizer that is trained.
        first_order: leave the derivative of the inner gradients out of the meta-gradient.
        priced: keep the openness of teleports in the graph.
        total: number of inner steps of the whole run, where the networks are told.
        unseen: share that the log loss on held-out data at the end of each window has in the losses that it gives.

    After a window `openness` has how far each step's teleports and gauges were open, `(length, tasks)`; None where the
    meta-optimizer chooses no group element.
    """

    stack: TaskStack
    meta: MetaOptimizer
    first_order: bool = False
    priced: bool = False
    total: int | None = None
    unseen: float = 0.0
    steps: int = 0
    start: Tensor | None = None
    unseen_start: Tensor | None = None
    state: MetaState | None = None
    openness: Tensor | None = None
    _begun: Tensors = dataclasses.field(default_factory=dict, repr=False)
    _measured: Tensor | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._begun = {name: value.detach().clone() for name, value in self.stack.tensors().items()}

    def window(self, length: int, track: bool = True, loss_known: bool = True) -> Tensor:
        """Takes some inner steps and returns the log losses after each, `(length, tasks)`, in the graph.

        With `unseen` each of them is a weighted mean with the log loss on held-out data after the last step.

        The next window starts where this one ended, cut from its graph.

        Args:
            length: number of inner steps.
            track: keep the graph for the meta-gradient; without it nothing grows with the number of steps.
            loss_known: whether the steps know the loss; if not, they act as in a training loop that does not tell it.
        """
        optimizer = StackOptimizer(self.stack, self.meta, self.stack.deterministic)
        optimizer.loop.state, optimizer.loop.total = self.state, self.total
        optimizer.first_order = self.first_order
        optimizer.loss_known = loss_known
        stays = self.meta.teleporter is not None
        chosen: list[Elements] = []
        opened: list[Tensor] = []
        with unroll_context(self.stack, optimizer, track) as (model, differentiable):
            seen = model(self.stack.batch(self.steps), probe=True)
            if self.start is None:
                self.start = seen.losses.detach()
            if self.unseen and self.unseen_start is None:
                self.unseen_start = model(self._held_out()).detach()
            along = []
            for _ in range(length):
                differentiable.step(seen)
                self.steps += 1
                taken = differentiable.loop.last_step
                assert taken is not None
                with torch.set_grad_enabled(track and self.priced):
                    chosen.append(elements_of(taken, stays))
                    if len(chosen) == _TOGETHER:
                        opened, chosen = _measured(opened, chosen), []
                seen = model(self.stack.batch(self.steps), probe=True)
                along.append(seen.losses if track else seen.losses.detach())
            unseen = model(self._held_out()) if self.unseen else None
            moved = dict(zip(self.stack.names, model.fast_params, strict=True))
            assert differentiable.loop.state is not None
            self.state = differentiable.loop.state.map(Tensor.detach)
        self.stack.load(moved)
        with torch.set_grad_enabled(track and self.priced):
            opened = _measured(opened, chosen)
            self.openness = torch.cat(opened) if opened else None
        losses = torch.stack(along)
        logs = log_losses(losses, self.start, self._scale(losses.detach()))
        if unseen is None:
            return logs
        assert self.unseen_start is not None
        return torch.lerp(logs, log_losses(unseen.unsqueeze(0), self.unseen_start).expand_as(logs), self.unseen)

    def _held_out(self) -> Batch:
        found = self.stack.held_out
        if found is None:
            raise FamilyError(
                f"outer.unseen = {self.unseen:g} is a share for held-out data, and tasks of this family have none: "
                "leave it out"
            )
        return found

    def _scale(self, losses: Tensor) -> Tensor | None:
        r"""$\|\nabla L\| \|w\|$ at the start of each task, where a loss is not positive; None where all are.

        To first order it is how far the loss would go if the weights changed by their own size. It scales with the
        loss, does not see what is added to it, and knows nothing of the optimizer.
        """
        assert self.start is not None
        if self._measured is None and bool(((losses < 0).any(0) | (self.start <= 0)).any()):
            point = self.stack.point_at(self._begun, self.stack.batch(0))
            squares = [value.flatten(1).square().sum(1) for value in self._begun.values()]
            size = torch.stack(squares).sum(0).sqrt()
            self._measured = point.squared_gradient_norm().sqrt() * torch.where(size > 0, size, 1.0)
        return self._measured


def _measured(opened: list[Tensor], chosen: list[Elements]) -> list[Tensor]:
    """What is known of the openness, with that of some more steps."""
    found = openness_along(chosen)
    return opened if found is None else [*opened, found]
