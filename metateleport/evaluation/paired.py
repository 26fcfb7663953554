"""Paired comparisons of two methods on the same tasks, also over several meta-seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from metateleport.evaluation.tuning import LARGEST

__all__ = ["CONFIDENCE", "REFERENCE", "PairedRatio", "interquartile_mean", "paired_ratio", "ratio_over_seeds"]

REFERENCE = "learned"
"""Name of the method that the others are compared with, task by task."""

CONFIDENCE = 0.95
"""Confidence of the intervals in reports."""

_SMALLEST = 1e-300


class PairedRatio(NamedTuple):
    """The ratio of two methods' losses on the same task, as the median over tasks, with its interval."""

    ratio: float
    low: float
    high: float


def paired_ratio(
    losses: npt.ArrayLike, reference: npt.ArrayLike, confidence: float = CONFIDENCE, draws: int = 2000, seed: int = 0
) -> PairedRatio:
    """Compares two methods task by task: the median of log ratios, with a bootstrap interval over tasks.

    Args:
        losses: final losses of one method, `(tasks,)`.
        reference: final losses of the other method on the same tasks.
        confidence: confidence of the interval.
        draws: number of bootstrap samples.
        seed: seed of the bootstrap.

    Returns:
        The ratio, above 1 where `reference` is better, and the percentile interval. Losses are clipped to 1e-300
        and 1e300.

    Raises:
        ValueError: if the numbers of tasks differ.

    Example:
        >>> paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).ratio
        2.0
    """
    logs = _log_ratios(losses, reference)
    if logs.ndim != 1:
        raise ValueError(f"a paired comparison of two methods takes one loss for each task: got {logs.shape}")
    picks = np.random.default_rng(seed).integers(len(logs), size=(draws, len(logs)))
    return _interval(float(np.median(logs)), np.median(logs[picks], axis=1), confidence)


def ratio_over_seeds(
    losses: npt.ArrayLike, reference: npt.ArrayLike, confidence: float = CONFIDENCE, draws: int = 2000, seed: int = 0
) -> PairedRatio:
    r"""Compares two methods over meta-seeds and tasks: the interquartile mean of log ratios, with a bootstrap interval.

    $r_{st} = \log L'_{st} - \log L_{st}$ for meta-seed s and task t; the middle half of all $r_{st}$ is averaged. A
    bootstrap sample draws meta-seeds with replacement and, independently, tasks with replacement, the same tasks for
    every meta-seed drawn. Seeds and tasks are crossed, so the effect of a hard task on all seeds does not count several
    times as evidence. With few seeds the interval is somewhat too narrow, as with every bootstrap of few values, so
    report the worst meta-seed beside it.

    Args:
        losses: final losses of one method, `(meta-seeds, tasks)`.
        reference: those of the other method, for the same seeds and tasks; with equal rows if it has no meta-seeds.
        confidence: confidence of the interval.
        draws: number of bootstrap samples.
        seed: seed of the bootstrap.

    Returns:
        The ratio, above 1 where `reference` is better, and the percentile interval. Losses are clipped to 1e-300
        and 1e300.

    Raises:
        ValueError: if the numbers of tasks or of meta-seeds differ.

    Source: the interquartile mean is that of Agarwal et al., NeurIPS 2021 (arXiv 2108.13264, "rliable"); resampling
    both crossed factors is Owen's pigeonhole bootstrap (Annals of Applied Statistics 1, 2007).

    Example:
        >>> ratio_over_seeds([[2.0, 4.0], [3.0, 6.0]], [[1.0, 2.0], [1.0, 2.0]], draws=100).low
        2.0
    """
    logs = _log_ratios(losses, reference)
    if logs.ndim != 2:
        raise ValueError(f"a comparison over meta-seeds takes a row of losses for each: got {logs.shape}")
    source = np.random.default_rng(seed)
    seeds, tasks = (source.integers(count, size=(draws, count)) for count in logs.shape)
    samples = logs[seeds[:, :, None], tasks[:, None, :]].reshape(draws, -1)
    return _interval(float(interquartile_mean(logs.reshape(1, -1))[0]), interquartile_mean(samples), confidence)


def interquartile_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean of the middle half of each row.

    Example:
        >>> interquartile_mean(np.asarray([[1.0, 2.0, 4.0, 1e9]]))
        array([3.])
    """
    cut = values.shape[1] // 4
    return np.asarray(np.sort(values, axis=1)[:, cut : values.shape[1] - cut].mean(1))


def _log_ratios(losses: npt.ArrayLike, reference: npt.ArrayLike) -> npt.NDArray[np.float64]:
    ours, theirs = (np.asarray(each, dtype=np.float64).clip(_SMALLEST, LARGEST) for each in (losses, reference))
    if ours.shape != theirs.shape:
        raise ValueError(f"a paired comparison needs the same tasks: got {ours.shape} and {theirs.shape} losses")
    return np.asarray(np.log(ours) - np.log(theirs))


def _interval(value: float, samples: npt.NDArray[np.float64], confidence: float) -> PairedRatio:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    # The exponential of a difference of two clipped logarithms can still overflow.
    return PairedRatio(*(float(np.exp(min(each, _LARGEST_LOG))) for each in (value, low, high)))


_LARGEST_LOG = float(np.log(LARGEST))
