"""The paired comparison of two methods on the same tasks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from metateleport.evaluation.tuning import LARGEST

__all__ = ["CONFIDENCE", "REFERENCE", "PairedRatio", "paired_ratio"]

REFERENCE = "learned"
"""The method that others are compared to, task by task, where it is there."""

CONFIDENCE = 0.95
"""Of the intervals in reports."""

_SMALLEST = 1e-300


class PairedRatio(NamedTuple):
    """Median over tasks of the ratio of two methods' losses on one task, with its interval."""

    ratio: float
    low: float
    high: float


def paired_ratio(
    losses: npt.ArrayLike, reference: npt.ArrayLike, confidence: float = CONFIDENCE, draws: int = 2000, seed: int = 0
) -> PairedRatio:
    """Compares two methods task by task: the median of log ratios, with a bootstrap interval over tasks.

    Args:
        losses: final losses of one method, `(tasks,)`.
        reference: those of the other on the same tasks.
        confidence: of the interval.
        draws: number of bootstrap samples.
        seed: seeds them.

    Returns:
        The ratio, above 1 where `reference` is better, and the percentile interval. Losses are taken between 1e-300
        and 1e300.

    Raises:
        ValueError: if the tasks are not the same in number.

    Example:
        >>> paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).ratio
        2.0
    """
    ours, theirs = (np.asarray(each, dtype=np.float64).clip(_SMALLEST, LARGEST) for each in (losses, reference))
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"a paired comparison needs the same tasks: got {ours.shape} and {theirs.shape} losses")
    logs = np.log(ours) - np.log(theirs)
    picks = np.random.default_rng(seed).integers(len(logs), size=(draws, len(logs)))
    medians = np.median(logs[picks], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    # exp of a difference of two such logs can still overflow.
    return PairedRatio(*(float(np.exp(min(value, _LARGEST_LOG))) for value in (np.median(logs), low, high)))


_LARGEST_LOG = float(np.log(LARGEST))
