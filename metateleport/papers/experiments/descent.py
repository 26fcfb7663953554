"""Plain gradient descent on small functions, many starts and step sizes side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metateleport.papers.experiments.base import LARGEST

__all__ = ["Function", "best_step", "descend"]

Function = Callable[[Tensor], Tensor]
"""Maps a vector `(n,)` to a scalar, through torch."""


def descend(function: Function, starts: Tensor, step: Tensor | float, steps: int) -> tuple[Tensor, Tensor]:
    """Gradient descent at constant step sizes.

    Args:
        function: what to lower.
        starts: `(batch, n)`.
        step: the step size, one for all or `(batch,)`.
        steps: number of steps.

    Returns:
        The path, `(steps + 1, batch, n)`, and the values along it, `(steps + 1, batch)`; a value that is not finite
        stands as 1e300.

    Example:
        >>> path, values = descend(lambda x: x.square().sum(), torch.ones(1, 2).double(), 0.5, 1)
        >>> values[:, 0].tolist()
        [2.0, 0.0]
    """
    both = torch.func.vmap(torch.func.grad_and_value(function))
    size = torch.as_tensor(step, dtype=starts.dtype).expand(len(starts)).unsqueeze(1)
    path, values = [starts], []
    for _ in range(steps):
        gradient, value = both(path[-1])
        values.append(value)
        path.append(path[-1] - size * gradient)
    values.append(torch.func.vmap(function)(path[-1]))
    found = torch.stack(values)
    return torch.stack(path), torch.where(found.isfinite(), found, LARGEST).clamp_max(LARGEST)


def best_step(function: Function, starts: Tensor, grid: Tensor, steps: int) -> float:
    """The step size of a grid with the lowest median log of the final values over all starts.

    Args:
        function: what to lower.
        starts: `(batch, n)`.
        grid: step sizes to try, `(sizes,)`.
        steps: number of steps.
    """
    repeated = starts.repeat(len(grid), 1)
    final = descend(function, repeated, grid.repeat_interleave(len(starts)), steps)[1][-1]
    scores = final.clamp_min(1 / LARGEST).log().reshape(len(grid), len(starts)).median(1).values
    return float(grid[int(scores.argmin())])
