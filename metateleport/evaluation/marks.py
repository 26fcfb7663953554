"""The numbers of gradient evaluations at which results are reported."""

from __future__ import annotations

__all__ = ["REFERENCE_MARKS", "marks"]

REFERENCE_MARKS = (12, 30, 100, 300, 1000)
"""Marks at which results of all budgets are comparable: a few steps, the training horizon, and far beyond it."""


def marks(steps: int) -> list[int]:
    """The gradient evaluations at which results are reported: the reference marks within the budget, and its end.

    Example:
        >>> marks(100), marks(50), marks(8)
        ([12, 30, 100], [12, 30, 50], [8])
    """
    return [place for place in REFERENCE_MARKS if place < steps] + [steps]
