"""Confidence intervals for experiments."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["bootstrap", "median_interval", "share_interval"]

Array = npt.NDArray[np.float64]


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score.

    Args:
        successes: how many of the trials.
        trials: at least one.

    Example:
        >>> low, high = share_interval(10, 10)
        >>> round(low, 2), high
        (0.72, 1.0)
    """
    z = 1.959963984540054
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    # Rounding must not leave the exact ends.
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def bootstrap(
    values: npt.ArrayLike, statistic: Callable[[Array], float], seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic, by drawing rows again.

    Args:
        values: `(samples, ...)`; whole rows are drawn, so that pairs stay together.
        statistic: maps drawn rows to a number.
        seed: seeds the draws.
        draws: how many.

    Example:
        >>> bootstrap([1.0, 1.0, 1.0], np.median)
        (1.0, 1.0)
    """
    rows = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(rows), size=(draws, len(rows)))
    low, high = np.quantile([statistic(rows[pick]) for pick in picks], [0.025, 0.975])
    return float(low), float(high)


def median_interval(values: npt.ArrayLike, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of the median of all values: `bootstrap` of it, with all draws at once.

    Args:
        values: `(samples, ...)`; whole rows are drawn, so that pairs stay together.
        seed: seeds the draws.
        draws: how many.

    Example:
        >>> median_interval([[0.0, 2.0], [1.0, 1.0]]) == bootstrap([[0.0, 2.0], [1.0, 1.0]], np.median)
        True
    """
    rows = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(rows), size=(draws, len(rows)))
    low, high = np.quantile(np.median(rows[picks].reshape(draws, -1), axis=1), [0.025, 0.975])
    return float(low), float(high)
