"""The baselines that a learned optimizer is held against, each with the grid that it is tuned on."""

from __future__ import annotations

from typing import Any

import torch

from metateleport.evaluation.methods.first_order import SCHEDULES, FirstOrder, GradientAscent
from metateleport.evaluation.methods.lbfgs import LBFGS
from metateleport.evaluation.methods.second_order import GaussNewton, soap
from metateleport.evaluation.methods.whitening import VARIANTS, Whitening
from metateleport.evaluation.trajectory import Method
from metateleport.evaluation.tuning import Choice, Lattice, Recipe

__all__ = ["BASELINES", "REFERENCES"]


def _gd(**settings: Any) -> Method:
    return FirstOrder("gd", torch.optim.SGD, **settings)


def _momentum(**settings: Any) -> Method:
    return FirstOrder("momentum", torch.optim.SGD, momentum=0.9, **settings)


def _adam(**settings: Any) -> Method:
    return FirstOrder("adam", torch.optim.Adam, **settings)


BASELINES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("gd", _gd),
        Recipe("momentum", _momentum),
        Recipe("adam", _adam),
        # Its line search finds the length; lr is only the first trial's.
        Recipe("lbfgs", LBFGS, Lattice(-1, 0), tasks=8),
        Recipe(
            "gradient-ascent",
            GradientAscent,
            choices={
                "schedule": Choice(tuple(SCHEDULES)),
                "size": Choice((1.0, 3.0)),
            },
            tasks=8,
        ),
        # A step relative to the curvature bound is of order one.
        Recipe(
            "whitening",
            Whitening,
            Lattice(-2, 1),
            choices={"variant": Choice(tuple(VARIANTS)), "relative": Choice((True, False))},
            tasks=16,
        ),
    )
}
"""By method name, in the order of tables."""

REFERENCES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("gauss-newton", GaussNewton, Lattice(-1, 0), choices={"damping": Choice((1e-3, 1.0))}, tasks=8),
        Recipe("soap", soap, choices={"precondition_frequency": Choice((1, 10))}, tasks=8),
    )
}
"""Second-order references, run where they are asked for by name: they take long, and `soap` a further package."""
