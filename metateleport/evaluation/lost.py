"""Diverged tasks of a stack: they stay where they are, and the others go on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LOST", "where"]

LOST = 1e12
"""A task whose loss has grown by this factor counts as diverged and stays where it is: if it overflowed, the linear
algebra of the whole stack would fail."""


def where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Stacked values: `yes` for the tasks that a mask marks, `no` for the others.

    Args:
        mask: boolean `(tasks,)`.
        yes: `(tasks, ...)`.
        no: of the same shape.

    Example:
        >>> where(torch.tensor([True, False]), torch.ones(2, 2), torch.zeros(2, 2)).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    return torch.where(mask.reshape(-1, *(1,) * (no.ndim - 1)), yes, no)
