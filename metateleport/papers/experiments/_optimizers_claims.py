"""The claims of the experiment `optimizers`, decided by its runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from metateleport.papers.experiments.base import Claim, finite
from metateleport.papers.experiments.intervals import median_interval
from metateleport.papers.experiments.ways import ONCE, PLAIN

__all__ = ["REGIMES", "along", "claims", "log_ratios", "ratio_of"]

Array = npt.NDArray[np.float64]

REGIMES = {
    "source": "the source's step size",
    "plain": "the best step size without teleports",
    "own": "each at its own best step size",
}
# The optimizers of the figure, as the authors' repository draws it; its losses stand by epoch and by second.
_PAPER = "ICLR 2024, figure 5"
_SOURCES = {**dict.fromkeys(("momentum", "adagrad", "rmsprop", "adam"), _PAPER), "sgd": "NeurIPS 2022, abstract"}
_ASCENT = "ascent, batch form, early"
_LATE = "ascent, batch form, late"


def along(losses: npt.ArrayLike) -> Array:
    """Geometric mean of the losses along a run without its start; runs in front.

    Losses above ten times the first are clipped there: a run that diverged has failed, however far it went.
    """
    return np.exp(_bounded(losses)[..., 1:].mean(-1))


def claims(data: Mapping[str, Any]) -> list[Claim]:
    """All claims, decided by the runs of all data sets.

    Args:
        data: for each data set and optimizer the `courses` of each step size and method.
    """
    names = list(next(iter(data.values())))
    by_source = [name for name in names if all("source" in family[name]["courses"] for family in data.values())]
    who = "all optimizers" if len(names) > 1 else names[0]
    # The source's code has step sizes for some of the optimizers only.
    regimes = {regime: by_source if regime == "source" else names for regime in REGIMES}
    regimes = {regime: those for regime, those in regimes.items() if those}
    found = []

    def lower(words: str, source: str, regime: str, method: str, against: str = PLAIN, **options: Any) -> None:
        ratios = log_ratios(data, regime, method, against, options.pop("names", regimes[regime]), **options)
        found.append(_lower(ratios, f"{words}, {REGIMES[regime]})", source))

    for name, regime in itertools.product(names, regimes):
        if name in regimes[regime]:
            words = f"one early teleport lowers {name}'s training loss along the run (batch form"
            lower(words, _SOURCES.get(name, "here"), regime, _ASCENT, names=[name])
    for what, way, regime in itertools.product(("training", "held-out"), ("batch form", "rescaling"), regimes):
        words = f"one early teleport lowers the {what} loss along the run ({who}, {way}"
        source = _PAPER if (way, regime) == ("batch form", "source") else "here"
        lower(words, source, regime, f"ascent, {way}, early", what=what)
    for clock, regime in itertools.product(("evaluations", "seconds"), regimes):
        words = "evaluations" if clock == "evaluations" else "seconds of processor time"
        source = _PAPER if (clock, regime) == ("seconds", "source") else "here"
        lower(f"one early teleport lowers the training loss at equal {words} (batch form", source, regime, _ASCENT,
              clock=clock)  # fmt: skip
    for regime in regimes:
        words = "gradient ascent does better than a random element of the same size (batch form, early"
        lower(words, "here", regime, _ASCENT, "random, batch form, early")
    for way, when in itertools.product(("batch form", "rescaling"), ("late", "often")):
        words = f"teleporting {when} does better than once early ({way}, training"
        lower(words, "here", "plain", f"ascent, {way}, {when}", f"ascent, {way}, early")
    for way, regime in itertools.product(ONCE, ("plain", "own")):
        words = f"one early teleport lowers the training loss along the run ({who}, {way}"
        lower(words, "here", regime, f"{way}, early")
    found.append(_jump(data, names))
    return found


def log_ratios(
    data: Mapping[str, Any],
    regime: str,
    method: str,
    against: str,
    names: Sequence[str],
    what: str = "training",
    clock: str = "steps",
) -> Array:
    """Log of the ratio of two methods' losses, `(tasks, optimizers)`, tasks of all data sets in rows.

    Args:
        data: as in `claims`.
        regime: which step sizes.
        method: the numerator.
        against: the denominator.
        names: of the optimizers.
        what: `training` or `held-out`.
        clock: with `steps`, losses along the run; with `evaluations` or `seconds`, losses at the time when the second
            method has finished.
    """
    key = what.replace("-", "_")
    rows = []
    for family in data.values():
        columns = []
        for name in names:
            ours, theirs = (family[name]["courses"][regime][each] for each in (method, against))
            if clock == "steps":
                columns.append(np.log(along(ours[key])) - np.log(along(theirs[key])))
            else:
                columns.append(_when_through(ours, theirs, key, clock) - _bounded(theirs[key])[..., -1])
        rows.append(np.stack(columns, axis=1))
    return np.concatenate(rows)


def ratio_of(logs: Array) -> tuple[float, tuple[float, float]]:
    """The median ratio and its interval; whole tasks are resampled."""
    low, high = median_interval(logs)
    value, low, high = (float(np.exp(min(each, 690.0))) for each in (float(np.median(logs)), low, high))
    return finite(value), (finite(low), finite(high))


def _bounded(losses: npt.ArrayLike) -> Array:
    values = np.asarray(losses, dtype=np.float64)
    return np.log(values.clip(1e-300, 10 * values[..., :1]))


def _when_through(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str, clock: str) -> Array:
    """Logs of our losses at the time when the other runs have finished, or at our end if that is earlier."""
    found = []
    for run, losses in enumerate(_bounded(ours[key])):
        # Of the seconds there is one column for all runs.
        own, end = (
            (ours[clock], theirs[clock][-1]) if clock == "seconds" else (ours[clock][run], theirs[clock][run][-1])
        )
        found.append(np.interp(end, own, losses))
    return np.array(found)


def _lower(logs: Array, claim: str, source: str) -> Claim:
    """The claim that the median ratio is below one."""
    value, (low, high) = ratio_of(logs)
    holds = True if high < 1 else False if low > 1 else None
    return Claim(f"{claim}: median ratio", source, value, (low, high), holds)


def _jump(data: Mapping[str, Any], names: Sequence[str]) -> Claim:
    """The claim about the jump of the held-out loss; half-way, as at the start the outputs are near chance."""
    late = [[family[name]["courses"]["plain"][_LATE]["jump"] for name in names] for family in data.values()]
    value, (low, high) = ratio_of(np.concatenate([np.log(each).T for each in late]))
    holds = True if low > 1 else False if high < 1 else None
    words = "a late teleport along the batch form raises the held-out loss at once: median of after over before"
    return Claim(words, "here", value, (low, high), holds)
