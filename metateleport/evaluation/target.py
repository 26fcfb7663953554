"""Evaluations and seconds that each method needs to a target: the loss that one method has at its k-th evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from metateleport.evaluation.compared import Pair, pairs_of
from metateleport.evaluation.paired import CONFIDENCE, REFERENCE, paired_ratio, ratio_over_seeds
from metateleport.evaluation.run import Evaluation, EvaluationError, Result
from metateleport.evaluation.words import interval

__all__ = ["Target", "evaluations_to", "target_of"]

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Target:
    """The loss that a method has at its k-th gradient evaluation, task by task.

    Args:
        method: name of the method.
        at: the number k.

    Example:
        >>> Target.parse("adam@300")
        Target(method='adam', at=300)
    """

    method: str
    at: int

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads `METHOD@K`.

        Raises:
            EvaluationError: if the text is not of this form.
        """
        method, _, at = text.rpartition("@")
        if not method or not at.isdecimal() or int(at) < 1:
            raise EvaluationError(f"a target is METHOD@K, as adam@300: the loss of a method at K; not {text!r}")
        return cls(method, int(at))

    def check(self, names: Sequence[str], steps: int) -> None:
        """Checks the target before anything runs.

        Args:
            names: names of the methods that will run.
            steps: the budget.

        Raises:
            EvaluationError: if the target's method is not among them, or the budget is too small.
        """
        if self.method not in names:
            raise EvaluationError(f"the target {self} needs {self.method!r} among the methods: {', '.join(names)}")
        if self.at > steps:
            raise EvaluationError(f"the target {self} lies past the budget of {steps}: give at least that many steps")

    def __str__(self) -> str:
        return f"{self.method}@{self.at}"


def evaluations_to(loss: npt.ArrayLike, goal: npt.ArrayLike) -> Array:
    """The first gradient evaluation at which each task's loss is at most its goal; infinite where it never is.

    Args:
        loss: losses along the trajectory, `(tasks, budget + 1)`.
        goal: the goal of each task, `(tasks,)`.

    Example:
        >>> evaluations_to([[3.0, 2.0, 1.0], [3.0, 2.5, 2.2]], [2.0, 2.0]).tolist()
        [1.0, inf]
    """
    there = np.asarray(loss, dtype=np.float64) <= np.asarray(goal, dtype=np.float64)[:, None]
    return np.where(there.any(1), there.argmax(1), np.inf)


class _Goal(NamedTuple):
    """The goal of each task: a loss and, if given, an accuracy to reach at the same time."""

    loss: Array
    accuracy: Array | None = None

    def needed(self, result: Result) -> Array:
        """The first evaluation at which each task reaches the goal; infinite if it never does."""
        run = result.trajectory
        if self.accuracy is None or run.held_out_accuracy is None:
            return evaluations_to(run.loss, self.loss)
        right = run.held_out_accuracy >= self.accuracy[:, None]
        return evaluations_to(np.where(right, run.loss, np.inf), self.loss)


def target_of(evaluation: Evaluation, target: Target) -> dict[str, Any]:
    """The gradient evaluations and seconds that each method needs to the target, and their ratios.

    The loss is the evaluation's measure: the loss on all of a task's training data, on minibatches too, or the task's
    own measure. A task has reached the goal as soon as its loss is at most the goal, so the target's own method may
    reach it before its k-th evaluation.

    A ratio is the other method's number over the learned one's: above 1 the learned one is better. A task that does not
    reach the goal is censored. If the other method is censored, its whole budget is counted, which is less than it
    would need. If the learned one is censored, it counts as worse than any number. If both are, they count as equal.

    Args:
        evaluation: with the target's method.
        target: the target.

    Returns:
        `target`, `goal` (its median over tasks), and

        - `methods`, by name: `evaluations` and `seconds` (medians over tasks; the budget's if the median is censored),
          `censored` (a number of tasks), and, if the tasks have a score, the `held_out_accuracy` at the goal (mean over
          tasks; at the end of the budget if censored);
        - if there is a learned method, `in_words` and `ratios_to_learned`, by name: `evaluations` and `seconds`, each
          with `ratio`, `low`, `high`; `held_out_accuracy`, the learned method's minus the other's at the goal, with
          `difference`, `low`, `high`; with several meta-seeds also `meta_seeds`, the same over all of them and for the
          `worst` seed;
        - if the tasks have a score, `and_accuracy` with `methods` and `ratios_to_learned` as above, for the first
          evaluation at which a task has both the loss and the held-out accuracy of the target.
    """
    reference = evaluation.results[target.method]
    loss = _level(reference, target.at)
    found: dict[str, Any] = {"target": str(target), "goal": float(np.median(loss)), **_to(evaluation, _Goal(loss))}
    accuracy = reference.trajectory.held_out_accuracy
    if accuracy is not None:
        found["and_accuracy"] = _to(evaluation, _Goal(loss, np.asarray(accuracy[:, target.at], dtype=np.float64)))
    if REFERENCE in evaluation.results:
        found["confidence"] = CONFIDENCE
        found["in_words"] = _in_words(found, target)
    return found


def _to(evaluation: Evaluation, goal: _Goal) -> dict[str, Any]:
    """What each method needs to a goal and, if there is a learned method, the ratios to it."""
    found: dict[str, Any] = {"methods": {name: _summary(run, goal) for name, run in evaluation.results.items()}}
    if REFERENCE not in evaluation.results:
        return found
    ratios: dict[str, Any] = {}
    for name, result in evaluation.results.items():
        if name == REFERENCE:
            continue
        entry: dict[str, Any] = _beside(Pair(0, evaluation.results[REFERENCE], result), goal)
        pairs = pairs_of(evaluation, name)
        if len(pairs) > 1:
            entry["meta_seeds"] = _over(pairs, goal)
        ratios[name] = entry
    return {**found, "ratios_to_learned": ratios}


def _level(result: Result, place: int) -> Array:
    # A diverged task has an infinite goal, which every method reaches.
    return np.asarray(np.nan_to_num(result.trajectory.loss[:, place], nan=np.inf, posinf=np.inf))


def _summary(result: Result, goal: _Goal) -> dict[str, Any]:
    needed = goal.needed(result)
    budget = result.trajectory.loss.shape[1] - 1
    middle = float(np.median(np.minimum(needed, budget)))
    entry: dict[str, Any] = {
        "evaluations": middle,
        "seconds": float(np.median(_seconds(result, needed))),
        "censored": int(np.isinf(needed).sum()),
    }
    accuracy = _accuracy(result, needed)
    if accuracy is not None:
        entry["held_out_accuracy"] = float(accuracy.mean())
    return entry


def _places(result: Result, needed: Array) -> npt.NDArray[np.int64]:
    return np.minimum(needed, result.trajectory.loss.shape[1] - 1).astype(np.int64)


def _seconds(result: Result, needed: Array) -> Array:
    return np.asarray(result.trajectory.seconds_along[_places(result, needed)])


def _accuracy(result: Result, needed: Array) -> Array | None:
    accuracy = result.trajectory.held_out_accuracy
    return None if accuracy is None else accuracy[np.arange(len(needed)), _places(result, needed)]


def _numbers(pair: Pair, goal: _Goal) -> dict[str, tuple[Array, Array]]:
    """The other method's numbers and the learned one's; censored numbers are replaced as `target_of` says."""
    mine, theirs = goal.needed(pair.learned), goal.needed(pair.other)
    both, lost = np.isinf(mine) & np.isinf(theirs), np.isinf(mine)
    found = {}
    for what, other, counted in (
        ("evaluations", _places(pair.other, theirs).astype(np.float64), mine),
        ("seconds", _seconds(pair.other, theirs), _seconds(pair.learned, mine)),
    ):
        own = np.where(both, other, np.where(lost, np.inf, counted))
        # A goal that is reached at the start takes neither any evaluations.
        found[what] = (np.where(other == own, 1.0, other), np.where(other == own, 1.0, own))
    return found


def _beside(pair: Pair, goal: _Goal) -> dict[str, Any]:
    entry: dict[str, Any] = {what: paired_ratio(*numbers)._asdict() for what, numbers in _numbers(pair, goal).items()}
    gain = _gain(pair, goal)
    if gain is not None:
        picks = np.random.default_rng(0).integers(len(gain), size=(2000, len(gain)))
        entry["held_out_accuracy"] = _spread(gain.mean(), gain[picks].mean(1))
    return entry


def _gain(pair: Pair, goal: _Goal) -> Array | None:
    """The learned method's held-out accuracy at the goal minus the other's, `(tasks,)`."""
    mine = _accuracy(pair.learned, goal.needed(pair.learned))
    theirs = _accuracy(pair.other, goal.needed(pair.other))
    return None if mine is None or theirs is None else mine - theirs


def _over(pairs: Sequence[Pair], goal: _Goal) -> dict[str, Any]:
    alone = [{"seed": pair.seed, **_beside(pair, goal)} for pair in pairs]
    numbers = [_numbers(pair, goal) for pair in pairs]
    found: dict[str, Any] = {}
    for what in ("evaluations", "seconds"):
        others, own = (np.stack([each[what][side] for each in numbers]) for side in (0, 1))
        worst = min(alone, key=lambda each: each[what]["ratio"])
        ratio = ratio_over_seeds(others, own)._asdict()
        found[what] = {**ratio, "worst": {"seed": worst["seed"], **worst[what]}}
    gains = [gain for gain in (_gain(pair, goal) for pair in pairs) if gain is not None]
    if gains:
        stacked, source = np.stack(gains), np.random.default_rng(0)
        seeds, tasks = (source.integers(count, size=(2000, count)) for count in stacked.shape)
        samples = stacked[seeds[:, :, None], tasks[:, None, :]].mean((1, 2))
        worst = min(alone, key=lambda each: each["held_out_accuracy"]["difference"])
        found["held_out_accuracy"] = {
            **_spread(stacked.mean(), samples),
            "worst": {"seed": worst["seed"], **worst["held_out_accuracy"]},
        }
    return found


def _spread(value: float, samples: Array) -> dict[str, float]:
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"difference": float(value), "low": float(low), "high": float(high)}


def _in_words(found: Mapping[str, Any], target: Target) -> str:
    own = found["methods"][REFERENCE]
    words = f"{REFERENCE}: {own['evaluations']:.0f} gradient evaluations and {own['seconds']:.3g} s to the loss that "
    words += f"{target.method} has at {target.at}"
    words += f", {own['censored']} tasks not there. " if own["censored"] else ". "
    words += f"Others' over its own: {_told_of(found)}."
    against = found["ratios_to_learned"].get(target.method, {})
    accuracy = against.get("meta_seeds", against).get("held_out_accuracy")
    if accuracy is not None:
        words += " Held-out accuracy there less that of {}: {:+.2%} [{:+.2%}, {:+.2%}].".format(
            target.method, *(accuracy[key] for key in ("difference", "low", "high"))
        )
    both = found.get("and_accuracy")
    if both is not None:
        own = both["methods"][REFERENCE]
        words += f" To that loss and the held-out accuracy that {target.method} has at {target.at}: "
        words += f"{own['evaluations']:.0f}"
        words += f", {own['censored']} tasks not there" if own["censored"] else ""
        words += f"; others' over its own: {_told_of(both)}."
    return words


def _told_of(found: Mapping[str, Any]) -> str:
    """The ratios of evaluations and of seconds, over meta-seeds where there are several."""
    told = []
    for name, entry in found["ratios_to_learned"].items():
        best = entry.get("meta_seeds", entry)
        told.append(f"{name} {interval(best['evaluations'])} and in seconds {interval(best['seconds'])}")
    return "; ".join(told)
