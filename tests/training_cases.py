"""Meta-trainings that are small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from learned_cases import shape_of

from metateleport.families import load_family
from metateleport.learned import MetaOptimizer
from metateleport.training import (
    FamilySettings,
    MetaTrainer,
    Recipe,
    ValidationSettings,
)
from metateleport.training.outer import ESTIMATORS

_SMALL: dict[str, Any] = {
    "family": "leaky_mlp",
    "settings": {"width": 4, "activation": "identity"},
    "meta_steps": 6,
    "tasks": 3,
    "unroll": 3,
    "horizon": 6,
    "validation_tasks": 4,
    "validation_every": 2,
    "hidden": 4,
    "device": "cpu",
}
_TINY: dict[str, Any] = {
    "settings": {"width": 3, "activation": "identity"},
    "meta_steps": 2,
    "tasks": 2,
    "unroll": 2,
    "horizon": 2,
    "validation_tasks": 2,
    "validation_every": 1,
    "hidden": 3,
}
_OUTER = {name for kind in ESTIMATORS.values() for name in kind.names()}


def small(**changes: Any) -> Recipe:
    """Six meta-steps, in windows of half the horizon.

    Args:
        changes: `family` and its `settings`, the `estimator` and settings of the outer loop, `validation_tasks` and
            `validation_every`, and what `learned_cases.shape_of` takes.
    """
    given = {**_SMALL, **changes}
    family = FamilySettings(given.pop("family"), given.pop("settings"))
    validation = ValidationSettings(
        given.pop("validation_tasks"), min(given.pop("validation_every"), given["meta_steps"] or 10**9)
    )
    kind = ESTIMATORS[given.pop("estimator", "tbptt")]
    own = {name: given.pop(name) for name in _OUTER if name in given}
    outer = kind(**{name: value for name, value in own.items() if name in kind.names()})
    shape = shape_of(**given)
    return Recipe(family, shape.rule, shape.teleport, shape.gauge, outer, validation)


def tiny(**changes: Any) -> Recipe:
    """Two meta-steps of two tasks."""
    return small(**{**_TINY, **changes})


def family_of(recipe: Recipe) -> Any:
    """The task family of a recipe."""
    return load_family(recipe.family.name, recipe.family.settings)


def trainer(settings: Recipe) -> MetaTrainer:
    torch.manual_seed(0)
    return MetaTrainer(settings, family_of(settings), MetaOptimizer(settings.networks(("GL",))))


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
