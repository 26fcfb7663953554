"""Ascent of a function over a vector space, with fixed steps or a line search, for a batch of tasks at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from metateleport.groups import Group

__all__ = ["Ascent", "Direction"]

Direction = Literal["ascent", "descent"]

# What the last accepted step size is multiplied by, tried in one step of a line search.
_FACTORS = (4.0, 2.0, 1.0, 0.5, 0.125)


@dataclasses.dataclass(frozen=True)
class Ascent:
    r"""$T_{m+1} = T_m + \eta\, \nabla J(T_m) / |\nabla J(T_0)|$ from $T_0 = 0$, kept within $|T| \le$ `cap`.

    With a line search every step tries several multiples of the last step size and takes the best of them, or stays:
    the number of values is known beforehand, and each task of a batch has a step size of its own.

    Args:
        steps: number of steps, at least one.
        step_size: $\eta$ of the first step.
        cap: largest norm of $T$.
        direction: `ascent` or `descent`.
        line_search: whether steps are searched for.
        value_cap: a task whose $J$ is above it makes no further step.

    Raises:
        ValueError: if a number is out of range or the direction is unknown.

    Example:
        >>> from metateleport.groups import PositiveDiagonal
        >>> Ascent(20, 0.1, 5.0, line_search=True).run(PositiveDiagonal(1), torch.zeros(1), lambda t: -(t[0] - 1) ** 2)
        tensor([1.])
    """

    steps: int
    step_size: float
    cap: float
    direction: Direction = "ascent"
    line_search: bool = False
    value_cap: float | None = None

    def __post_init__(self) -> None:
        if self.direction not in ("ascent", "descent"):
            raise ValueError(f"the direction is 'ascent' or 'descent', not {self.direction!r}")
        if self.steps < 1:
            raise ValueError(f"gradient {self.direction} needs at least one step, not {self.steps!r}")
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size has to be positive (direction='descent' goes down), not {self.step_size!r}")
        if not self.cap > 0:
            raise ValueError(f"the cap is the largest norm of a move and has to be positive, not {self.cap!r}")

    @property
    def sign(self) -> int:
        """1 where it goes up, -1 where it goes down."""
        return 1 if self.direction == "ascent" else -1

    def cost(self, slope: float) -> float:
        """Gradient evaluations of a run, where a value with its gradient costs `slope` and a value alone a third."""
        return self.steps * slope * (1 + len(_FACTORS) * self.line_search / 3)

    def relative_gain(self, before: Tensor, after: Tensor) -> Tensor:
        """How much of its size a value went the right way."""
        return self.sign * (after - before) / before.abs().clamp_min(torch.finfo(before.dtype).tiny)

    def run(self, space: Group, start: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """The end of the ascent, detached.

        Args:
            space: gives the norm of an element of the vector space, `(*batch, *space.shape)`.
            start: zeros of that shape.
            objective: gives `(*batch,)` values, differentiable in its argument.
        """
        chosen, first = start, None
        size = torch.full_like(space.norm(start), self.sign * self.step_size)
        for _ in range(self.steps):
            with torch.enable_grad():
                trial = chosen.detach().requires_grad_()
                values = objective(trial)
                slope = torch.zeros_like(trial)
                if values.requires_grad:
                    (slope,) = torch.autograd.grad(values.sum(), trial)
            values = values.detach()
            if first is None:
                first = space.norm(slope).clamp_min(torch.finfo(slope.dtype).tiny)
                # A slope that is rounding alone would become a direction when it is divided by its norm.
                level = first * self.cap <= 1e3 * torch.finfo(slope.dtype).eps * values.abs()
                first = torch.where(level, torch.inf, first)
            direction = slope / space.expand(first)
            if self.value_cap is not None:
                direction = torch.where(space.expand(values > self.value_cap), 0.0, direction)
            if self.line_search:
                chosen, size = self._searched(space, chosen, direction, size, values, objective)
            else:
                chosen = self._capped(space, chosen + space.expand(size) * direction)
        return chosen.detach()

    def _capped(self, space: Group, proposed: Tensor) -> Tensor:
        norm = space.norm(proposed).clamp_min(torch.finfo(proposed.dtype).tiny)
        return proposed * space.expand((self.cap / norm).clamp_max(1.0))

    def _searched(
        self,
        space: Group,
        chosen: Tensor,
        direction: Tensor,
        size: Tensor,
        values: Tensor,
        objective: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        best, best_value = chosen, self.sign * values
        # Where nothing is better, the next step begins below all that was tried.
        best_size = size * _FACTORS[-1] / 2
        for factor in _FACTORS:
            candidate = self._capped(space, chosen + space.expand(factor * size) * direction)
            with torch.no_grad():
                value = self.sign * objective(candidate)
            better = value > best_value
            best = torch.where(space.expand(better), candidate, best)
            best_size = torch.where(better, factor * size, best_size)
            best_value = torch.where(better, value, best_value)
        return best, best_size
