"""Gradient ascent over a Lie group, with fixed steps or a line search, for a batch of tasks at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from metateleport.groups import Group

__all__ = ["Arrived", "Ascent", "Direction", "differentiated"]

Direction = Literal["ascent", "descent"]

# What the last accepted step size is multiplied by, tried in one step of a line search.
_FACTORS = (4.0, 2.0, 1.0, 0.5, 0.125)


class Evaluate(Protocol):
    """A function of group elements: values `(*batch,)`, detached, and where wanted the direction of steepest ascent.

    The direction at $g$ is the gradient in $S$ at 0 of the function at $\\exp(S)\\, g$.
    """

    def __call__(self, element: Tensor, sloped: bool) -> tuple[Tensor, Tensor | None]: ...


def differentiated(group: Group, function: Callable[[Tensor], Tensor]) -> Evaluate:
    """The function and its direction by reverse-mode differentiation.

    Args:
        group: of the elements.
        function: maps elements to `(*batch,)` values.
    """

    def evaluate(element: Tensor, sloped: bool) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(sloped):
            trial = element.detach().requires_grad_(sloped)
            values = function(trial)
            if not sloped:
                return values.detach(), None
            # A task that nothing moves has values without a graph.
            slope = torch.autograd.grad(values.sum(), trial)[0] if values.requires_grad else torch.zeros_like(trial)
        return values.detach(), group.trivialised(element, slope)

    return evaluate


@dataclasses.dataclass(frozen=True)
class Ascent:
    r"""$g_{m+1} = \exp(\eta\, D_m / |D_0|)\, g_m$ from $g_0 = 1$, at most as far as `cap`; $D_m$ is the slope at $g_m$.

    With a line search every step tries several multiples of the last step size and takes the best, or stays if none is
    better. The number of evaluations is fixed, and each task of a batch has its own step size.

    Args:
        steps: number of steps, at least one.
        step_size: $\eta$ of the first step.
        cap: largest length of the way, the norms of all steps together.
        direction: `ascent` or `descent`.
        line_search: whether steps are searched for.
        value_cap: a task whose $J$ is above it makes no further step.

    Raises:
        ValueError: if a number is out of range or the direction is unknown.

    Example:
        >>> from metateleport.symmetries.translation import Translation
        >>> line = Translation(1)
        >>> bowl = differentiated(line, lambda x: -((x[0] - 1) ** 2))
        >>> Ascent(20, 0.1, 5.0, line_search=True).run(line, torch.zeros(1), bowl).element
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
        """Gradient evaluations of a run whose steps are all made; a value with its gradient costs `slope`."""
        return self.steps * slope * (1 + len(_FACTORS) * self.line_search / 3)

    def relative_gain(self, before: Tensor, after: Tensor) -> Tensor:
        """How much of its size a value went the right way."""
        return self.sign * (after - before) / before.abs().clamp_min(torch.finfo(before.dtype).tiny)

    def run(self, group: Group, start: Tensor, evaluate: Evaluate) -> Arrived:
        """Runs the ascent until every task has stopped; the result is detached.

        A task stops at the cap, above `value_cap`, where its slope is zero, or where a value is not finite.
        Evaluations after that are not charged to it.

        Args:
            group: where it goes.
            start: the identity, `(*batch, *group.shape)`.
            evaluate: the objective.
        """
        here = _Place(start, torch.zeros_like(group.norm(start)))
        size = torch.full_like(here.length, self.sign * self.step_size)
        first: Tensor | None = None
        stopped, spent = torch.zeros_like(here.length, dtype=torch.bool), torch.zeros_like(here.length)
        for _ in range(self.steps):
            # Written so that a length that is not a number stops too.
            stopped = stopped | ~(here.length < self.cap)
            if bool(stopped.all()):
                break
            spent = spent + (~stopped).to(spent.dtype)
            values, slope = evaluate(here.element, True)
            assert slope is not None
            if first is None:
                first = group.norm(slope).clamp_min(torch.finfo(slope.dtype).tiny)
                # A slope that is rounding alone would become a direction when it is divided by its norm.
                level = first * self.cap <= 1e3 * torch.finfo(slope.dtype).eps * values.abs()
                first = torch.where(level, torch.inf, first)
            direction = slope / group.expand(first)
            if self.value_cap is not None:
                direction = torch.where(group.expand(values > self.value_cap), 0.0, direction)
            length = group.norm(direction)
            stopped = stopped | (length == 0) | ~length.isfinite()
            if self.line_search:
                if bool(stopped.all()):
                    break
                # A value alone costs a third.
                spent = spent + (~stopped).to(spent.dtype) * (len(_FACTORS) / 3)
                here, size = self._searched(group, here, direction, size, values, evaluate)
            else:
                here = self._stepped(group, here, group.expand(size) * direction)
        return Arrived(here.element, here.length, spent)

    def _stepped(self, group: Group, here: _Place, step: Tensor) -> _Place:
        norm = group.norm(step)
        left = self.cap - here.length
        share = (left / norm.clamp_min(torch.finfo(step.dtype).tiny)).clamp_max(1.0)
        length = torch.where(norm >= left, self.cap, here.length + norm)
        return _Place(group.retract(here.element, step * group.expand(share)), length)

    def _searched(
        self, group: Group, here: _Place, direction: Tensor, size: Tensor, values: Tensor, evaluate: Evaluate
    ) -> tuple[_Place, Tensor]:
        best, best_value = here, self.sign * values
        # Where nothing is better, the next step begins below all that was tried.
        best_size = size * _FACTORS[-1] / 2
        for factor in _FACTORS:
            tried = self._stepped(group, here, group.expand(factor * size) * direction)
            value = self.sign * evaluate(tried.element, False)[0]
            better = value > best_value
            best = _Place(
                torch.where(group.expand(better), tried.element, best.element),
                torch.where(better, tried.length, best.length),
            )
            best_size = torch.where(better, factor * size, best_size)
            best_value = torch.where(better, value, best_value)
        return best, best_size


class Arrived(NamedTuple):
    """Where an ascent ended, the length of the way there, and its cost in values with their gradient, `(*batch,)`."""

    element: Tensor
    length: Tensor
    spent: Tensor


class _Place(NamedTuple):
    element: Tensor
    length: Tensor
