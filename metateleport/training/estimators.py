"""Estimators of the meta-gradient: each follows one stack of tasks, and gives a meta-gradient after every window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from metateleport.families import TaskStack
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.distributed import Ranks
from metateleport.training.outer import TruncatedSettings
from metateleport.training.scoring import openness_sum, priced
from metateleport.training.unroll import Unroll

__all__ = ["Estimator", "Findings", "Truncated"]


class Findings(NamedTuple):
    """What one window has shown, over the tasks of all processes; the same on all of them.

    Args:
        loss: the meta-loss without the price on teleports.
        openness: mean openness of teleports; None where none are learned.
        usable: whether there is a meta-gradient to step along.
        seconds: what the processes said that they had spent, their mean.
    """

    loss: float
    openness: float | None
    usable: bool
    seconds: float


class Estimator(Protocol):
    """Follows one stack of tasks from window to window."""

    def meta_gradient(self, blind: bool, seconds: float) -> Findings:
        """Takes the next window and puts the meta-gradient into the networks' `grad`.

        Args:
            blind: whether the networks see no loss in this window.
            seconds: spent by this process since it last said so.
        """
        ...


class Truncated:
    """Backpropagation through one window at a time; the processes' meta-gradients are summed.

    Args:
        stacks: this process's part of the tasks, at their start: one stack, or several that are followed one after
            another (`outer.tasks_at_once`).
        meta: the networks.
        outer: the outer loop's settings.
        ranks: the processes that share the tasks.
        total: number of inner steps of the run, where the networks are told.
    """

    def __init__(
        self,
        stacks: Sequence[TaskStack],
        meta: MetaOptimizer,
        outer: TruncatedSettings,
        ranks: Ranks,
        total: int | None = None,
    ) -> None:
        self.meta, self.outer, self.ranks = meta, outer, ranks
        self.unrolls = [
            Unroll(stack, meta, outer.first_order, outer.teleport_cost > 0, total, outer.unseen) for stack in stacks
        ]

    def meta_gradient(self, blind: bool, seconds: float) -> Findings:
        """The derivative of the window's mean log loss, plus the price on teleports; see `Estimator`."""
        self.meta.zero_grad()
        several, cost, sums = len(self.unrolls) > 1, self.outer.teleport_cost, []
        for unroll in self.unrolls:
            losses = unroll.window(self.outer.unroll, loss_known=not blind)[-self.outer.last(self.outer.unroll) :]
            # A task whose loss is not finite is left out; the rest of its stack is used.
            finite = losses.isfinite()
            loss = torch.where(finite, losses, torch.zeros_like(losses)).sum()
            opened, counted = openness_sum(unroll.openness, like=loss)
            sums.append(torch.stack((loss.detach(), finite.sum().to(loss), opened.detach(), counted)).double())
            if several:
                # How many of all are finite is known after the last stack only, and this one's graph is not kept.
                share = len(unroll.stack) / self.outer.tasks
                losses_of_own, openness_of_own = finite.sum().clamp_min(1), counted.clamp_min(1)
                priced(share * loss / losses_of_own, share * opened / openness_of_own, cost).backward()
        # The means are over the tasks of all processes, so their numbers are needed before the backward pass.
        spent = sums[0].new_tensor([seconds / self.ranks.size])
        whole = self.ranks.total(torch.cat((torch.stack(sums).sum(0), spent)))
        losses_of_all, openness_of_all = whole[1].clamp_min(1).to(loss), whole[3].clamp_min(1).to(loss)
        if not several:
            priced(loss / losses_of_all, opened / openness_of_all, cost).backward()
        if not self.ranks.alone:
            self._sum_gradients()
        means = [float(whole[0] / losses_of_all), float(whole[2] / openness_of_all)]
        return Findings(means[0], means[1] if bool(whole[3] > 0) else None, bool(whole[1] > 0), float(whole[4]))

    def _sum_gradients(self) -> None:
        parameters = list(self.meta.parameters())
        # Behind each gradient stands whether there is one: Adam leaves out a network that no task made use of.
        found = [each.grad is not None for each in parameters]
        parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        flat = torch.cat([*(part.flatten() for part in parts), parts[0].new_tensor(found)])
        *summed, used = self.ranks.total(flat).split([*(each.numel() for each in parameters), len(parameters)])
        for each, part, there in zip(parameters, summed, used, strict=True):
            each.grad = part.view_as(each).clone() if bool(there) else None
