"""Tuning of baselines: a stated grid, searched from coarse to fine on training tasks, and remembered."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metateleport.evaluation.trajectory import Method, ends_only
from metateleport.families import TaskFamily, TaskStack
from metateleport.files import write_text
from metateleport.version import VERSION

__all__ = ["Choice", "Lattice", "Recipe", "cache_folder", "score", "search", "tune"]

LARGEST = 1e300
"""Stands for a loss that is not finite."""

_SMALLEST = 1e-300
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The values `10^(j/4)` of a positive setting, without an end on either side.

    Args:
        low: the coarse scan's first exponent of ten.
        high: its last.

    Example:
        >>> Lattice(-1, 1).coarse()
        [-4, 0, 4]
        >>> Lattice(-1, 1).value(-2)
        0.316228
    """

    low: int
    high: int

    def coarse(self) -> list[int]:
        """Indices of the coarse scan: whole powers of ten."""
        return list(range(4 * self.low, 4 * self.high + 1, 4))

    def value(self, index: int) -> float:
        """The value at an index, to six digits, so that what is printed is what was run."""
        return float(f"{10 ** (index / 4):.6g}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A setting that is one of a few values; the first is where the search starts."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A baseline and the grid that it is tuned on.

    Args:
        name: of the method.
        make: makes the method from a step size and the values of the choices.
        step_size: the grid of the step size, passed as `lr`.
        choices: further settings by name. Every value is compared at a step size of its own.
        tasks: number of training tasks to tune on.
    """

    name: str
    make: Callable[..., Method]
    step_size: Lattice = dataclasses.field(default_factory=lambda: Lattice(-6, 1))
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    tasks: int = 16

    def grid(self) -> str:
        """The grid in words."""
        words = (
            f"lr: 10^(j/4), scanned by whole powers of ten from 1e{self.step_size.low} to 1e{self.step_size.high}, "
            "then at both neighbours of the best two and one places away until both are worse, past the ends too"
        )
        for name, choice in self.choices.items():
            words += f"; {name}: one of {', '.join(map(str, choice.values))}"
        if self.choices:
            words += "; the choices one after the other, each at its own best lr, until none changes"
        return words


def score(losses: Sequence[float] | np.ndarray) -> float:
    """Mean log of the final losses, what tuning makes small; a loss that is not finite counts as 1e300.

    Example:
        >>> round(score([1.0, math.e**2]), 9)
        1.0
    """
    values = np.nan_to_num(np.asarray(losses, dtype=np.float64), nan=LARGEST, posinf=LARGEST, neginf=_SMALLEST)
    # Below zero there is no logarithm: there each loss counts less the further down it is.
    return float((np.log(values.clip(_SMALLEST, LARGEST)) + np.arcsinh(values.clip(-LARGEST, 0.0))).mean())


def search(recipe: Recipe, evaluate: Callable[[dict[str, Any]], float]) -> list[tuple[dict[str, Any], float]]:
    """Searches a recipe's grid.

    Args:
        recipe: the baseline and its grid.
        evaluate: the score of some settings; smaller is better.

    Returns:
        The settings that were tried with their scores, in the order of trial. Of the best step size both neighbours
        have been tried, unless it lies 60 places from 1.
    """
    tried: dict[tuple[int, tuple[Any, ...]], float] = {}
    names = list(recipe.choices)

    def settings(index: int, chosen: tuple[Any, ...]) -> dict[str, Any]:
        return {"lr": recipe.step_size.value(index), **dict(zip(names, chosen, strict=True))}

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

    chosen = tuple(choice.values[0] for choice in recipe.choices.values())
    start = min(recipe.step_size.coarse(), key=lambda index: at(index, chosen))
    best, index = climb(start, chosen, (4, 2, 1))
    improved = bool(names)
    while improved:
        improved = False
        for place, name in enumerate(names):
            for value in recipe.choices[name].values:
                other = (*chosen[:place], value, *chosen[place + 1 :])
                if other == chosen:
                    continue
                value_best, value_index = climb(index, other, (1,))
                if value_best < best:
                    best, index, chosen, improved = value_best, value_index, other, True
    return [(settings(*key), found) for key, found in tried.items()]


_FARTHEST = 60


def tune(
    recipe: Recipe,
    family: TaskFamily,
    steps: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> Method:
    """Tunes a baseline on training tasks of a family, or remembers how it was.

    What is made small is the mean log of the final loss, or the mean loss on held-out data where the tasks have such.

    Args:
        recipe: the baseline and its grid.
        family: the tasks; those of the split `train`, with run seed 0, are tuned on.
        steps: gradient evaluations that each run may spend: the budget that the method is to be compared at.
        dtype: of the tasks; the family's own if not given.
        device: where to run.
        cache: folder to remember in; `cache_folder()` if not given.

    Returns:
        The method at the best settings, with all that was tried in its `tuning`.
    """
    path = (cache or cache_folder()) / f"{family.name}-{recipe.name}-{_key(recipe, family, steps, dtype)}.json"
    record = _remembered(path)
    cached = record is not None
    if record is None:
        record = _tuned(recipe, family.stack(range(recipe.tasks), "train", 0, dtype, device), steps)
        write_text(path, json.dumps(record, indent=1, allow_nan=False))
    method = recipe.make(**record["chosen"])
    method.tuning = {**record, "cached": cached}
    return method


def _tuned(recipe: Recipe, stack: TaskStack, steps: int) -> dict[str, Any]:
    def evaluate(settings: dict[str, Any]) -> float:
        with ends_only():
            trajectory = recipe.make(**settings).run(stack, steps)
        if trajectory.held_out_loss is None:
            return score(trajectory.loss[:, -1])
        # Fitting a few hundred training images exactly is no feat: some absurd step sizes do, and generalise badly.
        # Of those the mean tells; a mean of logs would be led by the tasks whose loss has rounded to zero.
        return score([float(np.nan_to_num(trajectory.held_out_loss[:, -1], nan=LARGEST, posinf=LARGEST).mean())])

    tried = search(recipe, evaluate)
    chosen, best = min(tried, key=lambda each: each[1])
    return {
        "criterion": "mean log of the final loss" if stack.held_out is None else "log of the mean final held-out loss",
        "split": "train",
        "seed": 0,
        "tasks": recipe.tasks,
        "gradient_evaluations": steps,
        "grid": recipe.grid(),
        "chosen": chosen,
        "score": best,
        "tried": [{**settings, "score": found} for settings, found in tried],
    }


def cache_folder() -> Path:
    """Where tuned settings are remembered: under `METATELEPORT_CACHE`, else under `~/.cache/metateleport`."""
    root = os.environ.get("METATELEPORT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "metateleport") / "tuning"


def _key(recipe: Recipe, family: TaskFamily, steps: int, dtype: torch.dtype | None) -> str:
    # The family's file is part of the key: a user's own is edited without a new name.
    try:
        source = Path(inspect.getfile(type(family))).read_text(encoding="utf-8")
    except (OSError, TypeError):
        source = ""
    parts = [
        _VERSION,
        VERSION,
        recipe.name,
        recipe.grid(),
        recipe.tasks,
        family.name,
        family.settings(),
        steps,
        str(dtype or family.dtype),
        source,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _remembered(path: Path) -> dict[str, Any] | None:
    """What a cache file says; None where there is none, or it was cut off or edited: then tuning runs again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        complete = isinstance(record["chosen"], dict) and math.isfinite(record["score"]) and bool(record["tried"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if complete else None
