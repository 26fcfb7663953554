"""Schedules of step sizes: constant, or a warm-up and a decay to the end of the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

__all__ = ["DECAYS", "WARM_UP", "Decay", "factor"]

Decay = Literal["cosine", "linear", "constant"]
DECAYS: tuple[Decay, ...] = get_args(Decay)

WARM_UP = 0.05
"""Share of the budget over which a step size that decays first grows."""

_FORMS: dict[Decay, Callable[[float], float]] = {
    "cosine": lambda place: (1 + math.cos(math.pi * place)) / 2,
    "linear": lambda place: 1 - place,
}


def factor(decay: Decay, step: int, budget: int) -> float:
    """The factor on the step size of one step.

    Args:
        decay: `constant`; or `cosine` or `linear`, which grow over 5 % of the budget and end at zero after its last
            step.
        step: number of the step, from 0.
        budget: number of steps.

    Example:
        >>> [round(factor("linear", step, 40), 3) for step in (0, 1, 2, 21, 39)]
        [0.5, 1.0, 1.0, 0.5, 0.026]
    """
    if decay == "constant":
        return 1.0
    warm = max(round(WARM_UP * budget), 1)
    if step < warm:
        return (step + 1) / warm
    return _FORMS[decay]((step - warm) / (budget - warm))
