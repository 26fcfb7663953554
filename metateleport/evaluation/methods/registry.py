"""The rivals that a learned optimizer is compared with: each has a file in this folder and a line here."""

from __future__ import annotations

import importlib

from metateleport.evaluation.rival import Rival

__all__ = ["BASELINES", "FAIR", "REFERENCES", "RIVALS"]

_FILES = (
    "first_order",
    "lbfgs",
    "gradient_ascent",
    "whitening",
    "gauss_newton",
    "adamw",
    "muon",
    "soap",
    "lora",
    "gauged",
    "balanced",
)
"""Files of this folder, each with a tuple `RIVALS`, in the order in which tables list the rivals."""


def _registered() -> dict[str, Rival]:
    folder = __name__.rpartition(".")[0]
    return {rival.name: rival for file in _FILES for rival in importlib.import_module(f"{folder}.{file}").RIVALS}


RIVALS: dict[str, Rival] = _registered()
"""All rivals by name."""

BASELINES: dict[str, Rival] = {name: rival for name, rival in RIVALS.items() if not rival.on_request}
"""The rivals that run if no names are given."""

REFERENCES: dict[str, Rival] = {name: rival for name, rival in RIVALS.items() if rival.on_request}
"""The rivals that run only if they are asked for by name: they take long, or need a further package."""

FAIR: dict[str, Rival] = {name: rival for name, rival in RIVALS.items() if rival.fair}
"""The rivals that run under fair rules if no names are given; those that need a symmetry, where tasks have it."""
