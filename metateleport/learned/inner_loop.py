"""The inner loop: what a meta-optimizer does with one evaluation after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from metateleport.learned.meta_optimizer import MetaOptimizer, MetaState, Regauge, Step
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Teleporter

__all__ = ["InnerLoop"]


@dataclasses.dataclass
class InnerLoop:
    """Judges an evaluation, teleports and steps, and remembers what it has to.

    It is the one inner loop that there is: meta-training runs it through `higher`, evaluation on stacks of tasks, and
    `metateleport.LearnedOptimizer` on a stack of one.

    Args:
        meta: the meta-optimizer.
        symmetries: of the model, in the order of the data flow.
        deterministic: whether every evaluation sees the same data.
        teleporter: takes the place of the learned one (attribution).
        regauge: exchanges the learned gauges for others (attribution).
        state: where to go on from; None before the first step.
        spends: whether nobody else reads a state of it, so that one step's memory serves the next; without a graph.

    Example:
        >>> import torch
        >>> from metateleport.learned import MetaOptimizerConfig, StepSettings
        >>> loop = InnerLoop(MetaOptimizer(MetaOptimizerConfig(StepSettings(hidden=4), teleport=None)))
        >>> weights = {"w": torch.ones(1, 2)}
        >>> for _ in range(3):
        ...     point = Point(weights, gradients=dict(weights), loss=weights["w"].square().sum(1) / 2)
        ...     weights = loop.advance(point).parameters
        >>> bool(weights["w"].abs().sum() < 2)
        True
    """

    meta: MetaOptimizer
    symmetries: Sequence[Symmetry] = ()
    deterministic: bool = True
    teleporter: Teleporter | None = None
    regauge: Regauge | None = None
    state: MetaState | None = None
    last_step: Step | None = None
    spends: bool = False

    def advance(
        self,
        point: Point,
        loss_known: bool = True,
        loss_fits: bool = True,
        along: Sequence[Symmetry] | None = None,
    ) -> Step:
        """One inner step on every task.

        Args:
            point: just evaluated at the parameters that the last step gave.
            loss_known: whether the point's loss is the loss of this evaluation; if not, nothing is taken back.
            loss_fits: whether gradients and cotangents are those of this loss, and not multiples; if not, rules that
                divide by it take a stand-in.
            along: those of the symmetries to move along and to step in gauges of; all of them if not given.

        Returns:
            The step; its `parameters` are to be evaluated next.
        """
        if self.state is None:
            self.state = self.meta.initial_state(point, self.symmetries, self.deterministic, self.teleporter)
        fits = loss_known and loss_fits
        step = self.meta.step(
            point, self.symmetries, self.state, self.teleporter, self.regauge, loss_known, fits, along, self.spends
        )
        self.state, self.last_step = step.state, step
        return step
