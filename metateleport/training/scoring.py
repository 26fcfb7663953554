"""The score of a meta-optimizer: the mean log loss along a whole horizon, over stacks with several settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metateleport.families import TaskFamily, TaskStack
from metateleport.families.task import Split
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.distributed import ALONE, Ranks
from metateleport.training.outer import OuterSettings
from metateleport.training.recipe import device_for
from metateleport.training.unroll import Unroll

__all__ = ["Score", "bounded", "dealt", "openness_sum", "priced", "score"]


class Score(NamedTuple):
    """A score, which includes the price on teleports, and the mean openness of teleports; zero without teleports."""

    value: float
    openness: float


def dealt(
    family: TaskFamily,
    outer: OuterSettings,
    tasks: int,
    parts: int,
    first: int,
    split: Split,
    seeds: tuple[int, int],
    ranks: Ranks = ALONE,
) -> Iterator[tuple[int, TaskStack]]:
    """Distributes tasks over stacks, each with its own settings, and gives those of this process.

    Args:
        family: the task family.
        outer: the outer loop's settings, for dtype and device.
        tasks: number of tasks; it is rounded down to equal parts.
        parts: number of stacks.
        first: index of the first stack.
        split: `train` or `validation`.
        seeds: the seed of the varied settings, and the seed of the tasks.
        ranks: the processes that share the tasks.

    Yields:
        The number of each stack from zero on, and the stack; where processes share its tasks, its part of them.
    """
    count = max(1, tasks // parts)
    share = ranks.share(parts * count)
    for part in range(parts):
        inside = range(max(share.start, part * count), min(share.stop, (part + 1) * count))
        if inside:
            own = family.augmented(first + part, seeds[0])
            indices = range(first * count + inside.start, first * count + inside.stop)
            yield part, own.stack(indices, split, seeds[1], outer.torch_dtype, device_for(outer.device))


def score(
    meta: MetaOptimizer,
    stacks: Iterable[tuple[int, TaskStack]],
    horizon: int,
    outer: OuterSettings,
    parts: int = 1,
    tasks: int = 0,
    ranks: Ranks = ALONE,
) -> Score:
    """Mean log loss along the horizon, or at its end, plus the price on teleports, without a graph.

    Args:
        meta: the meta-optimizer.
        stacks: their numbers, and the stacks at the start of their tasks; their parameters are changed.
        horizon: largest number of inner steps.
        outer: the outer loop's settings: `late`, `unseen`, `told` and `teleport_cost`.
        parts: number of stacks of all processes.
        tasks: number of tasks of all processes, if there are several.
        ranks: the processes; the stacks are those of this one, as `dealt` gives them.

    Returns:
        The score, the same on all processes, whatever their number.

    Example:
        >>> from metateleport import load_family
        >>> from metateleport.learned import MetaOptimizerConfig, StepSettings
        >>> from metateleport.training.outer import TruncatedSettings
        >>> stack = load_family("leaky_mlp", {"width": 3}).stack(range(2))
        >>> meta = MetaOptimizer(MetaOptimizerConfig(StepSettings(hidden=4), teleport=None))
        >>> score(meta, [(0, stack)], 2, TruncatedSettings(horizon=10)).openness
        0.0
    """
    rows = [torch.empty(0, 3, dtype=torch.float64, device=ranks.device)]
    for number, stack in stacks:
        steps = outer.scored(number, parts, horizon)
        unroll = Unroll(stack, meta, total=outer.total(0, steps), unseen=outer.unseen)
        means = bounded(unroll.window(steps, track=False).detach())[-outer.last(steps) :].mean(0)
        opened, counted = openness_sum(unroll.openness, like=means, dim=0)
        rows.append(torch.stack((means, opened, counted), 1).to(rows[0]))
    losses, opened, counted = ranks.gathered(torch.cat(rows), tasks).unbind(1)
    openness = opened.sum() / counted.sum().clamp_min(1)
    return Score(float(priced(losses.mean(), openness, outer.teleport_cost)), float(openness))


def priced(loss: Tensor, opened: Tensor, cost: float) -> Tensor:
    """The loss plus the price on teleports; the loss itself, bit for bit, if the price is zero.

    Example:
        >>> priced(torch.tensor(-2.0), torch.tensor(0.5), cost=3.0)
        tensor(-0.5000)
    """
    return loss + cost * opened if cost else loss


def openness_sum(opened: Tensor | None, like: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """The sum of the finite values of a window's openness, and their number; both zero where none is learned.

    Args:
        opened: `(steps, tasks)`, or None.
        like: a tensor of the shape, dtype and device of the results.
        dim: dimension to sum over; all of them if not given.
    """
    if opened is None:
        return torch.zeros_like(like), torch.zeros_like(like)
    finite, dims = opened.isfinite(), list(range(opened.ndim)) if dim is None else [dim]
    return torch.where(finite, opened, torch.zeros_like(opened)).sum(dims), finite.sum(dims).to(like)


def bounded(losses: Tensor) -> Tensor:
    """Log losses with a large number for those that are not finite: a diverged task gives a bad score, not a NaN."""
    return torch.nan_to_num(losses, 100.0, 100.0, -100.0).clamp_max(100.0)
