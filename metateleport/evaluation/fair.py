"""Fair rules: all rivals have equally many trials, on the same training tasks, for the measure that is claimed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from metateleport.evaluation.kept import cache_folder, foundations, kept_if_possible
from metateleport.evaluation.rival import Rival
from metateleport.evaluation.trajectory import Method, Trajectory, ends_only, every_so_often, reproducible
from metateleport.evaluation.tuning import LARGEST, Trials, score
from metateleport.families import TaskFamily, TaskStack
from metateleport.files import write_text
from metateleport.version import VERSION

__all__ = ["MEASURES", "FairRules", "Measured", "goal_of", "search_within", "tune_fairly"]

Measured = Literal["end", "held-out", "target", "seconds"]
MEASURES: tuple[Measured, ...] = get_args(Measured)

CRITERIA: dict[Measured, str] = {
    "end": "mean log of the loss at the end of the run",
    "held-out": "mean log of the held-out loss at the end of the run",
    "target": "mean log of the evaluations to the target",
    "seconds": "mean log of the seconds to the target",
}
"""What tuning minimises, in words."""

_VERSION = 1
_FARTHEST_LOG = 10.0
_POINTS = 60


@dataclasses.dataclass(frozen=True)
class FairRules:
    """The rules that rivals are tuned by.

    Args:
        trials: number of settings that each rival is tried with.
        measure: what is minimised: `end`, the loss at the end of the run; `held-out`, the held-out loss there;
            `target`, gradient evaluations to a target; `seconds`, seconds to it.
        target: METHOD@K, the loss that a rival, tuned for the end, has at K; for `target` and `seconds`.
        tasks: number of training tasks.

    Example:
        >>> FairRules(trials=6).words()
        '6 trials each on 8 training tasks, for the mean log of the loss at the end of the run'
    """

    trials: int = 12
    measure: Measured = "end"
    target: str | None = None
    tasks: int = 8

    @property
    def aims(self) -> bool:
        """Whether there is a target."""
        return self.measure in ("target", "seconds")

    def words(self) -> str:
        """The rules as a clause."""
        aim = f" {self.target}" if self.aims else ""
        return f"{self.trials} trials each on {self.tasks} training tasks, for the {CRITERIA[self.measure]}{aim}"

    def plain(self) -> dict[str, Any]:
        """The rules as plain values."""
        return {"rivals": "fair", **dataclasses.asdict(self), "criterion": CRITERIA[self.measure]}


class _Spent(Exception):
    """All trials are spent."""


def search_within(
    rival: Rival, evaluate: Callable[[dict[str, Any]], float], trials: int
) -> list[tuple[dict[str, Any], float]]:
    """Searches a rival's grid with a given number of trials, all of which are spent.

    First come the step sizes of the coarse scan and the neighbours of the best, two places away; then the other choices
    one by one, and closer step sizes; then whatever is near the best.

    Args:
        rival: the rival and its grid.
        evaluate: the score of some settings; smaller is better.
        trials: number of trials.

    Returns:
        The settings that were tried, with their scores, in the order of trial.

    Example:
        >>> from metateleport.evaluation.rival import Lattice
        >>> rival = Rival("x", lambda lr: None, Lattice(-3, 0))
        >>> tried = search_within(rival, lambda settings: abs(math.log10(settings["lr"] / 0.05)), 8)
        >>> len(tried), min(tried, key=lambda each: each[1])[0]
        (8, {'lr': 0.0562341})
    """
    tried: dict[tuple[int, tuple[Any, ...]], float] = {}
    names = list(rival.choices)

    def settings(index: int, chosen: tuple[Any, ...]) -> dict[str, Any]:
        return {"lr": rival.step_size.value(index), **dict(zip(names, chosen, strict=True))}

    def at(index: int, chosen: tuple[Any, ...]) -> float:
        if (index, chosen) not in tried:
            if len(tried) >= trials:
                raise _Spent
            tried[index, chosen] = evaluate(settings(index, chosen))
        return tried[index, chosen]

    def climb(spacing: int) -> None:
        while True:
            index, chosen = best()
            for near in (index - spacing, index + spacing):
                at(near, chosen)
            if best() == (index, chosen):
                return

    def best() -> tuple[int, tuple[Any, ...]]:
        return min(tried, key=lambda key: tried[key])

    def vary() -> None:
        for place, name in enumerate(names):
            for value in rival.choices[name].values:
                index, chosen = best()
                at(index, (*chosen[:place], value, *chosen[place + 1 :]))

    try:
        for index in rival.step_size.coarse():
            at(index, tuple(choice.values[0] for choice in rival.choices.values()))
        climb(2)
        while True:
            before, chosen = len(tried), best()[1]
            vary()
            if best()[1] != chosen:
                climb(2)
            climb(1)
            if len(tried) == before:
                break
        for distance in itertools.count(2):
            index, chosen = best()
            for near in (index - distance, index + distance):
                at(near, chosen)
    except _Spent:
        pass
    return [(settings(*key), found) for key, found in tried.items()]


def tune_fairly(
    rival: Rival,
    family: TaskFamily,
    steps: int,
    rules: FairRules,
    goal: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    fresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Method:
    """Tunes a rival under fair rules, or reads the cached result.

    Every finished trial is written to the cache, so that an interrupted search goes on from there.

    Args:
        rival: the rival and its grid.
        family: the task family; its first tasks of the split `train` with run seed 0 are used.
        steps: gradient evaluations of each run; the budget that the method will be compared at.
        rules: the rules.
        goal: for a target, the loss to reach on each of the training tasks, as `goal_of` gives it.
        dtype: dtype of the tasks; the family's own if not given.
        device: device to run on.
        cache: cache folder; `cache_folder("fair")` if not given.
        fresh: tune anew, ignoring the cache.
        progress: called with a line before every trial.

    Returns:
        The method at its best settings; its `tuning` lists all trials.

    Raises:
        ValueError: if the rules name a target and no goal is given, or tasks have no held-out data to be judged by.
    """
    if rules.aims and goal is None:
        raise ValueError("tuning for a target needs the goal: the loss to reach on each training task")
    folder = cache or cache_folder("fair")
    key = _key(rival, family, steps, rules, goal, dtype)
    path = folder / f"{family.name}-{rival.name}-{rules.measure}-{key}.json"
    record = None if fresh else _remembered(path)
    cached = record is not None
    if record is None:
        stack = family.stack(range(rules.tasks), "train", 0, dtype, device)
        if rules.measure == "held-out" and stack.held_out is None:
            raise ValueError(f"the tasks of {family.name} have no held-out data to tune for: give another measure")
        trials = Trials(path.with_suffix(".trials.json"), foundations(family, stack, steps), fresh)
        record = _tuned(rival, stack, steps, rules, goal, trials, progress or (lambda _: None))
        with kept_if_possible(folder):
            write_text(path, json.dumps(record, indent=1, allow_nan=False))
            trials.forget()
    method = rival.make(**record["chosen"])
    method.tuning = {**record, "cached": cached}
    return method


def goal_of(
    method: Method,
    family: TaskFamily,
    steps: int,
    at: int,
    rules: FairRules,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> list[float]:
    """The loss that a method has at its k-th evaluation on each of the tasks that rivals are tuned on.

    Args:
        method: the method, tuned for the end.
        family: the task family.
        steps: gradient evaluations of its run.
        at: the number k.
        rules: the rules.
        dtype: dtype of the tasks.
        device: device to run on.
    """
    stack = family.stack(range(rules.tasks), "train", 0, dtype, device)
    with reproducible(stack.device):
        trajectory = method.run(stack, steps)
    return np.nan_to_num(trajectory.loss[:, at], nan=LARGEST, posinf=LARGEST).tolist()


def _tuned(
    rival: Rival,
    stack: TaskStack,
    steps: int,
    rules: FairRules,
    goal: Sequence[float] | None,
    trials: Trials,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    count = itertools.count(1)

    def evaluate(settings: dict[str, Any]) -> float:
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        progress(f"trial {next(count)} of {rules.trials}: {shown} on {len(stack)} training tasks")
        return trials.score(settings, lambda: measured(settings))

    def measured(settings: dict[str, Any]) -> float:
        recorded = every_so_often(max(steps // _POINTS, 1)) if rules.aims else ends_only(rules.measure == "held-out")
        with recorded, reproducible(stack.device):
            trajectory = rival.make(**settings).run(stack, steps)
        return _score(rules.measure, trajectory, goal)

    tried = search_within(rival, evaluate, rules.trials)
    chosen, best = min(tried, key=lambda each: each[1])
    return {
        **rules.plain(),
        "split": "train",
        "seed": 0,
        "gradient_evaluations": steps,
        "grid": rival.grid(),
        "chosen": chosen,
        "score": best,
        "tried": [{**settings, "score": found} for settings, found in tried],
    }


def _score(measure: Measured, trajectory: Trajectory, goal: Sequence[float] | None) -> float:
    if measure == "end":
        return score(trajectory.loss[:, -1])
    if measure == "held-out":
        assert trajectory.held_out_loss is not None
        return score(trajectory.held_out_loss[:, -1])
    assert goal is not None
    return float(_logs_to(trajectory, np.asarray(goal), measure == "seconds").mean())


def _logs_to(trajectory: Trajectory, goal: npt.NDArray[np.float64], seconds: bool) -> npt.NDArray[np.float64]:
    """For each task the log of what it takes to the goal; one that misses it counts by how far it is off."""
    loss = np.nan_to_num(trajectory.loss, nan=LARGEST, posinf=LARGEST)
    there = loss <= goal[:, None]
    taken = trajectory.seconds_along if seconds else np.arange(loss.shape[1], dtype=np.float64)
    missed = np.log(2.0) + np.clip(_log(loss[:, -1]) - _log(goal), 0.0, _FARTHEST_LOG)
    spent = taken[np.where(there.any(1), there.argmax(1), loss.shape[1] - 1)]
    return np.asarray(np.log(np.maximum(spent, 1e-9)) + np.where(there.any(1), 0.0, missed))


def _log(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(np.log(np.maximum(values, 1e-300)))


def _key(
    rival: Rival,
    family: TaskFamily,
    steps: int,
    rules: FairRules,
    goal: Sequence[float] | None,
    dtype: torch.dtype | None,
) -> str:
    parts = [
        _VERSION,
        VERSION,
        rival.name,
        rival.grid(),
        rules.plain(),
        # Goals of two runs differ in rounding.
        None if goal is None else [f"{value:.4g}" for value in goal],
        family.name,
        family.settings(),
        steps,
        str(dtype or family.dtype),
        [_source(type(family)), _source(search_within), *_methods()],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _source(of: Any) -> str:
    """The text of the file that something is from, which may be edited without a new name; empty if there is none."""
    try:
        return Path(inspect.getfile(of)).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return ""


@functools.cache
def _methods() -> list[str]:
    """The texts of the files that methods are from."""
    folder = Path(__file__).with_name("methods")
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]


def _remembered(path: Path) -> dict[str, Any] | None:
    """The content of a cache file; None if there is none, or it was truncated or edited: then tuning runs again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        complete = isinstance(record["chosen"], dict) and math.isfinite(record["score"]) and bool(record["tried"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if complete else None
