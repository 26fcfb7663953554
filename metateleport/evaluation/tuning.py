"""Tuning of rivals: a stated grid, searched from coarse to fine on training tasks; results are cached."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metateleport.evaluation.kept import cache_folder, foundations, kept_if_possible
from metateleport.evaluation.rival import Rival
from metateleport.evaluation.trajectory import Method, ends_only, reproducible
from metateleport.families import TaskFamily, TaskStack
from metateleport.files import write_text
from metateleport.version import VERSION

__all__ = ["LARGEST", "Trials", "score", "search", "tune"]

LARGEST = 1e300
"""Value of a loss that is not finite."""

_SMALLEST = 1e-300
_VERSION = 1


def score(losses: Sequence[float] | np.ndarray) -> float:
    """The mean log of the final losses, which tuning minimises; a loss that is not finite counts as 1e300.

    Example:
        >>> round(score([1.0, math.e**2]), 9)
        1.0
    """
    values = np.nan_to_num(np.asarray(losses, dtype=np.float64), nan=LARGEST, posinf=LARGEST, neginf=_SMALLEST)
    # Losses below zero have no logarithm: asinh takes its place.
    return float((np.log(values.clip(_SMALLEST, LARGEST)) + np.arcsinh(values.clip(-LARGEST, 0.0))).mean())


def search(rival: Rival, evaluate: Callable[[dict[str, Any]], float]) -> list[tuple[dict[str, Any], float]]:
    """Searches a rival's grid.

    Args:
        rival: the rival and its grid.
        evaluate: the score of some settings; smaller is better.

    Returns:
        The settings that were tried, with their scores, in the order of trial. Both neighbours of the best step size
        were tried, unless it is 60 places from 1.
    """
    tried: dict[tuple[int, tuple[Any, ...]], float] = {}
    names = list(rival.choices)

    def settings(index: int, chosen: tuple[Any, ...]) -> dict[str, Any]:
        return {"lr": rival.step_size.value(index), **dict(zip(names, chosen, strict=True))}

    def at(index: int, chosen: tuple[Any, ...]) -> float:
        if (index, chosen) not in tried:
            tried[index, chosen] = evaluate(settings(index, chosen))
        return tried[index, chosen]

    def climb(index: int, chosen: tuple[Any, ...], spacings: Sequence[int]) -> tuple[float, int]:
        for spacing in spacings:
            moving = True
            while moving and abs(index) < _FARTHEST:
                near = min((index - spacing, index + spacing), key=lambda other: at(other, chosen))
                moving = at(near, chosen) < at(index, chosen)
                index = near if moving else index
        return at(index, chosen), index

    chosen = tuple(choice.values[0] for choice in rival.choices.values())
    start = min(rival.step_size.coarse(), key=lambda index: at(index, chosen))
    best, index = climb(start, chosen, (4, 2, 1))
    improved = bool(names)
    while improved:
        improved = False
        for place, name in enumerate(names):
            for value in rival.choices[name].values:
                other = (*chosen[:place], value, *chosen[place + 1 :])
                if other == chosen:
                    continue
                value_best, value_index = climb(index, other, (1,))
                if value_best < best:
                    best, index, chosen, improved = value_best, value_index, other, True
    return [(settings(*key), found) for key, found in tried.items()]


_FARTHEST = 60


def tune(
    rival: Rival,
    family: TaskFamily,
    steps: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    fresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Method:
    """Tunes a rival on training tasks of a family, or reads the cached result.

    Minimised is the mean log of the final loss or, if the tasks have held-out data, the mean loss on them. Every
    finished trial is written to the cache, so an interrupted search goes on from there.

    Args:
        rival: the rival and its grid.
        family: the task family; its tasks of the split `train` with run seed 0 are used.
        steps: gradient evaluations of each run; the budget that the method will be compared at.
        dtype: dtype of the tasks; the family's own if not given.
        device: device to run on.
        cache: cache folder; `cache_folder("tuning")` if not given.
        fresh: tune anew, ignoring the cache.
        progress: called with a line before every trial.

    Returns:
        The method at its best settings; its `tuning` lists all trials.
    """
    folder = cache or cache_folder("tuning")
    path = folder / f"{family.name}-{rival.name}-{_key(rival, family, steps, dtype)}.json"
    record = None if fresh else _remembered(path)
    cached = record is not None
    if record is None:
        stack = family.stack(range(rival.tasks), "train", 0, dtype, device)
        trials = Trials(path.with_suffix(".trials.json"), foundations(family, stack, steps), fresh)
        record = _tuned(rival, stack, steps, trials, progress or (lambda _: None))
        with kept_if_possible(folder):
            write_text(path, json.dumps(record, indent=1, allow_nan=False))
            trials.forget()
    method = rival.make(**record["chosen"])
    method.tuning = {**record, "cached": cached}
    return method


class Trials:
    """The scores of a running search, written to disk after every trial.

    Args:
        path: path of the file.
        foundations: hash of all that the scores depend on; scores of another hash are dropped.
        fresh: drop all earlier scores.
    """

    def __init__(self, path: Path, foundations: str, fresh: bool) -> None:
        self.path, self.foundations = path, foundations
        self.known: dict[str, float] = {}
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            if written["foundations"] == foundations and not fresh:
                self.known = {str(name): float(score) for name, score in written["scores"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass

    def score(self, settings: dict[str, Any], run: Callable[[], float]) -> float:
        name = json.dumps(settings, sort_keys=True, default=str)
        if name not in self.known:
            self.known[name] = run()
            with kept_if_possible(self.path.parent):
                write_text(self.path, json.dumps({"foundations": self.foundations, "scores": self.known}))
        return self.known[name]

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def _tuned(
    rival: Rival, stack: TaskStack, steps: int, trials: Trials, progress: Callable[[str], None]
) -> dict[str, Any]:
    def evaluate(settings: dict[str, Any]) -> float:
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        progress(f"{shown} on {len(stack)} training tasks")
        return trials.score(settings, lambda: measured(settings))

    def measured(settings: dict[str, Any]) -> float:
        with ends_only(), reproducible(stack.device):
            trajectory = rival.make(**settings).run(stack, steps)
        if trajectory.held_out_loss is None:
            return score(trajectory.loss[:, -1])
        # Some absurd step sizes fit a few hundred training images exactly and generalise badly. The mean shows that; a
        # mean of logs would be dominated by tasks whose loss has rounded to zero.
        return score([float(np.nan_to_num(trajectory.held_out_loss[:, -1], nan=LARGEST, posinf=LARGEST).mean())])

    tried = search(rival, evaluate)
    chosen, best = min(tried, key=lambda each: each[1])
    return {
        "criterion": "mean log of the final loss" if stack.held_out is None else "log of the mean final held-out loss",
        "split": "train",
        "seed": 0,
        "tasks": rival.tasks,
        "gradient_evaluations": steps,
        "grid": rival.grid(),
        "chosen": chosen,
        "score": best,
        "tried": [{**settings, "score": found} for settings, found in tried],
    }


def _key(rival: Rival, family: TaskFamily, steps: int, dtype: torch.dtype | None) -> str:
    # The family's file is part of the key, as a user's own is edited without a new name.
    try:
        source = Path(inspect.getfile(type(family))).read_text(encoding="utf-8")
    except (OSError, TypeError):
        source = ""
    parts = [
        _VERSION,
        VERSION,
        rival.name,
        rival.grid(),
        rival.tasks,
        family.name,
        family.settings(),
        steps,
        str(dtype or family.dtype),
        source,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _remembered(path: Path) -> dict[str, Any] | None:
    """The content of a cache file; None if there is none, or it was truncated or edited: then tuning runs again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        complete = isinstance(record["chosen"], dict) and math.isfinite(record["score"]) and bool(record["tried"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if complete else None
