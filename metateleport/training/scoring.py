"""What a meta-optimizer is scored by: the mean log loss along a whole horizon, over stacks of several settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metateleport.families import TaskFamily, TaskStack
from metateleport.families.task import Split
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.recipe import OuterSettings, device_for
from metateleport.training.unroll import Unroll

__all__ = ["Score", "dealt", "mean_openness", "priced", "score"]


class Score(NamedTuple):
    """A score, the price of teleports in it; and how far teleports and gauges were open, zero where there are none."""

    value: float
    openness: float


def dealt(
    family: TaskFamily, outer: OuterSettings, tasks: int, parts: int, first: int, split: Split, seeds: tuple[int, int]
) -> Iterator[TaskStack]:
    """Tasks dealt out to stacks, each with settings of its own.

    Args:
        family: where tasks come from.
        outer: of the training, for dtype and device.
        tasks: their number; what does not go into equal parts is left out.
        parts: number of stacks.
        first: number of the first stack.
        split: `train` or `validation`.
        seeds: of the settings that are varied, and of the tasks.

    Yields:
        The stacks.
    """
    count = max(1, tasks // parts)
    for part in range(first, first + parts):
        indices = range(part * count, (part + 1) * count)
        own = family.augmented(part, seeds[0])
        yield own.stack(indices, split, seeds[1], outer.torch_dtype, device_for(outer.device))


def score(meta: MetaOptimizer, stacks: Iterable[TaskStack], horizon: int, cost: float) -> Score:
    """Mean log loss along the horizon, with what teleports cost added; without a graph.

    Args:
        meta: the meta-optimizer.
        stacks: at the start of their tasks; they are moved along.
        horizon: inner steps.
        cost: the price of a teleport that is wide open.

    Returns:
        The score.

    Example:
        >>> from metateleport import load_family
        >>> from metateleport.learned import MetaOptimizerConfig, StepSettings
        >>> stack = load_family("leaky_mlp", {"width": 3}).stack(range(2))
        >>> meta = MetaOptimizer(MetaOptimizerConfig(StepSettings(hidden=4), teleport=None))
        >>> score(meta, [stack], horizon=2, cost=0.0).openness
        0.0
    """
    scores, openness = [], []
    for stack in stacks:
        unroll = Unroll(stack, meta)
        mean = _bounded(unroll.window(horizon, track=False).detach()).mean()
        opened = mean_openness(unroll)
        scores.append(priced(mean, opened, cost))
        openness.append(torch.zeros_like(mean) if opened is None else opened)
    return Score(float(torch.stack(scores).mean()), float(torch.stack(openness).mean()))


def priced(loss: Tensor, opened: Tensor | None, cost: float) -> Tensor:
    """The loss with what teleports cost added; itself, bit for bit, where they cost nothing.

    Example:
        >>> priced(torch.tensor(-2.0), torch.tensor(0.5), cost=3.0)
        tensor(-0.5000)
    """
    return loss + cost * opened if cost and opened is not None else loss


def mean_openness(unroll: Unroll) -> Tensor | None:
    """Over the steps and tasks of a window where it is finite; None where no group element is learned."""
    opened = unroll.openness
    if opened is None:
        return None
    finite = opened.isfinite()
    return torch.where(finite, opened, torch.zeros_like(opened)).sum() / finite.sum().clamp_min(1)


def _bounded(losses: Tensor) -> Tensor:
    """Log losses with what is not finite put far up, so that a diverged task spoils the score but leaves a number."""
    return torch.nan_to_num(losses, 100.0, 100.0, -100.0).clamp_max(100.0)
