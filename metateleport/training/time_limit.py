"""How far tasks can be followed where the time is limited: a score along the whole horizon may take longer than it."""

from __future__ import annotations

from collections.abc import Callable

from metateleport.families import TaskStack
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.unroll import Unroll

__all__ = ["steps_within"]


def steps_within(
    meta: MetaOptimizer, stack: TaskStack, least: int, horizon: int, seconds: float, clock: Callable[[], float]
) -> int:
    """The number of inner steps, without a graph, that fit into a time.

    They are tried: windows of doubling length, so that the trial takes up to twice the time.

    Args:
        meta: the meta-optimizer.
        stack: a stack at the start of its tasks; its parameters are changed.
        least: the smallest number, which is taken whatever time it needs.
        horizon: the largest number.
        seconds: the time.
        clock: tells the time in seconds.

    Example:
        >>> from metateleport import load_family
        >>> from metateleport.learned import MetaOptimizerConfig, StepSettings
        >>> meta = MetaOptimizer(MetaOptimizerConfig(StepSettings(hidden=4), teleport=None))
        >>> ticks = iter(range(100))
        >>> steps_within(meta, load_family("leaky_mlp", {"width": 3}).stack(range(2)), 1, 50, 3.5, lambda: next(ticks))
        15
    """
    unroll, steps, length, started = Unroll(stack, meta), 0, least, clock()
    while steps < horizon:
        length = min(length, horizon - steps)
        unroll.window(length, track=False)
        steps += length
        if clock() - started >= seconds:
            break
        length *= 2
    return steps
