"""The score of a meta-optimizer: the mean log loss along a whole horizon, over stacks with several settings."""

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
    """A score, which includes the price on teleports, and the mean openness of teleports; zero without teleports."""

    value: float
    openness: float


def dealt(
    family: TaskFamily, outer: OuterSettings, tasks: int, parts: int, first: int, split: Split, seeds: tuple[int, int]
) -> Iterator[TaskStack]:
    """Distributes tasks over stacks, each with its own settings.

    Args:
        family: the task family.
        outer: the outer loop's settings, for dtype and device.
        tasks: number of tasks; it is rounded down to equal parts.
        parts: number of stacks.
        first: index of the first stack.
        split: `train` or `validation`.
        seeds: the seed of the varied settings, and the seed of the tasks.

    Yields:
        The stacks.
    """
    count = max(1, tasks // parts)
    for part in range(first, first + parts):
        indices = range(part * count, (part + 1) * count)
        own = family.augmented(part, seeds[0])
        yield own.stack(indices, split, seeds[1], outer.torch_dtype, device_for(outer.device))


def score(meta: MetaOptimizer, stacks: Iterable[TaskStack], outer: OuterSettings) -> Score:
    """Mean log loss along the horizon, or its end, plus the price on teleports, without a graph.

    Args:
        meta: the meta-optimizer.
        stacks: the stacks at the start of their tasks; their parameters are changed.
        outer: the outer loop's settings: `horizon`, `late`, `told` and `teleport_cost`.

    Returns:
        The score.

    Example:
        >>> from metateleport import load_family
        >>> from metateleport.learned import MetaOptimizerConfig, StepSettings
        >>> stack = load_family("leaky_mlp", {"width": 3}).stack(range(2))
        >>> meta = MetaOptimizer(MetaOptimizerConfig(StepSettings(hidden=4), teleport=None))
        >>> score(meta, [stack], OuterSettings(unroll=2, horizon=2)).openness
        0.0
    """
    scores, openness = [], []
    for stack in stacks:
        unroll = Unroll(stack, meta, total=outer.horizon if outer.told else None)
        losses = _bounded(unroll.window(outer.horizon, track=False).detach())
        mean = losses[-max(1, round(outer.late * len(losses))) :].mean()
        opened = mean_openness(unroll)
        scores.append(priced(mean, opened, outer.teleport_cost))
        openness.append(torch.zeros_like(mean) if opened is None else opened)
    return Score(float(torch.stack(scores).mean()), float(torch.stack(openness).mean()))


def priced(loss: Tensor, opened: Tensor | None, cost: float) -> Tensor:
    """The loss plus the price on teleports; the loss itself, bit for bit, if the price is zero.

    Example:
        >>> priced(torch.tensor(-2.0), torch.tensor(0.5), cost=3.0)
        tensor(-0.5000)
    """
    return loss + cost * opened if cost and opened is not None else loss


def mean_openness(unroll: Unroll) -> Tensor | None:
    """Mean openness over the steps and tasks of a window, finite values only; None if no group element is learned."""
    opened = unroll.openness
    if opened is None:
        return None
    finite = opened.isfinite()
    return torch.where(finite, opened, torch.zeros_like(opened)).sum() / finite.sum().clamp_min(1)


def _bounded(losses: Tensor) -> Tensor:
    """Log losses with a large number for those that are not finite: a diverged task gives a bad score, not a NaN."""
    return torch.nan_to_num(losses, 100.0, 100.0, -100.0).clamp_max(100.0)
