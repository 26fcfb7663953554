"""Compares a method with the learned one: paired ratios at equal evaluations and at equal seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from metateleport.evaluation.marks import marks
from metateleport.evaluation.paired import REFERENCE, paired_ratio, ratio_over_seeds
from metateleport.evaluation.run import Evaluation, Result

__all__ = ["Pair", "compared", "pairs_of"]

Array = npt.NDArray[np.float64]


class Pair(NamedTuple):
    """The learned method's result of one meta-seed, and the other method's on the same tasks."""

    seed: int
    learned: Result
    other: Result


def pairs_of(evaluation: Evaluation, name: str) -> list[Pair]:
    """For each meta-seed the learned method's result and another's; a rival has the same result for all meta-seeds.

    Args:
        evaluation: with a learned method and the method of that name.
        name: name of the other method.
    """
    pairs = []
    for each in evaluation.meta_seeds:
        other = each.results.get(name) if name.startswith(f"{REFERENCE}/") else evaluation.results[name]
        if other is not None and REFERENCE in each.results:
            pairs.append(Pair(each.seed, each.results[REFERENCE], other))
    return pairs


def compared(
    learned: Result, other: Result, steps: int, pairs: Sequence[Pair] = (), timed: bool = True
) -> dict[str, Any]:
    """Paired ratios of another method's losses over the learned one's.

    Args:
        learned: the learned method's result.
        other: the other method's result on the same tasks.
        steps: the budget of both.
        pairs: both results for every meta-seed, if there are several.
        timed: whether losses were measured often enough to tell those at equal seconds.

    Returns:
        `gauge`, the other's `moves_by`; `stacked`, whether both step all tasks at once; `gradient_evaluations`, a list
        of `at`, `ratio`, `low`, `high` at the marks; `seconds`, where it is `timed`, the same at the time when the
        faster of the two had spent its budget. With several meta-seeds also `meta_seeds`: `gradient_evaluations` and
        `seconds` over all of them, as by `ratio_over_seeds`, each with the ratio of the `worst` seed and its interval
        over tasks.
    """
    found: dict[str, Any] = {
        "gauge": other.moves_by,
        "stacked": other.stacked and learned.stacked,
        "gradient_evaluations": [
            {"at": place, **_ratio(_loss(other, place), _loss(learned, place))} for place in marks(steps)
        ],
    }
    if timed:
        seconds = _seconds([Pair(0, learned, other)])
        found["seconds"] = {"at": seconds, **_ratio(_loss_after(other, seconds), _loss_after(learned, seconds))}
    if len(pairs) > 1:
        over: dict[str, Any] = {
            "gradient_evaluations": [{"at": place, **_over(pairs, _at(place))} for place in marks(steps)]
        }
        if timed:
            seconds = _seconds(pairs)
            over["seconds"] = {"at": seconds, **_over(pairs, lambda result: _loss_after(result, seconds))}
        found["meta_seeds"] = over
    return found


def _at(place: int) -> Callable[[Result], Array]:
    return lambda result: _loss(result, place)


def _over(pairs: Sequence[Pair], loss: Callable[[Result], Array]) -> dict[str, Any]:
    learned, others = [loss(pair.learned) for pair in pairs], [loss(pair.other) for pair in pairs]
    alone = [
        {"seed": pair.seed, **_ratio(*both)}
        for pair, both in zip(pairs, zip(others, learned, strict=True), strict=True)
    ]
    worst = min(alone, key=lambda each: each["ratio"])
    return {**ratio_over_seeds(np.stack(others), np.stack(learned))._asdict(), "worst": worst}


def _seconds(pairs: Sequence[Pair]) -> float:
    """The time when the fastest of all had spent its budget."""
    return float(min(result.trajectory.seconds_along[-1] for pair in pairs for result in (pair.learned, pair.other)))


def _ratio(theirs: Array, mine: Array) -> dict[str, float]:
    return paired_ratio(theirs, mine)._asdict()


def _loss(result: Result, place: int) -> Array:
    # A loss that is not finite has diverged and counts as the largest.
    return np.asarray(np.nan_to_num(result.trajectory.loss[:, place], nan=np.inf, posinf=np.inf))


def _loss_after(result: Result, seconds: float) -> Array:
    return _loss(result, int(np.searchsorted(result.trajectory.seconds_along, seconds, side="right")) - 1)
