"""The optimizers that `optimizers` teleports with, and how their step sizes are found."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from metateleport.papers.experiments.base import ExperimentError

__all__ = ["OPTIMIZERS", "Contender", "best_step_size", "require"]

FACTOR = 3.0
"""Ratio of neighbouring step sizes."""
FURTHEST = 5
"""How often the grid is extended."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer and the step sizes it is tried at.

    Args:
        make: makes it for a model, at a step size.
        start: the step size that the search starts from.
        source: the step size of the source's code on MNIST; None where the source has no such optimizer.
        library: the package it comes from.
    """

    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    start: float
    source: float | None = None
    library: str = "torch"


def _from_library(name: str, **settings: Any) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    def make(model: nn.Module, step_size: float) -> torch.optim.Optimizer:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(model.parameters(), lr=step_size, **settings)

    return make


def _muon(model: nn.Module, step_size: float) -> torch.optim.Optimizer:
    """Hidden matrices by Muon; the first, the last and the biases by its AdamW, as its authors advise."""
    from pytorch_optimizer import Muon

    hidden = [value for value in model.parameters() if value.ndim >= 2][1:-1]
    others = [value for value in model.parameters() if not any(value is each for each in hidden)]
    return Muon(
        [
            {"params": hidden, "use_muon": True, "lr": step_size},
            {"params": others, "use_muon": False, "lr": step_size},
        ]
    )


_LIBRARY = "pytorch_optimizer"
OPTIMIZERS: dict[str, Contender] = {
    "sgd": Contender(lambda model, lr: torch.optim.SGD(model.parameters(), lr), 0.1, 1e-2),
    "momentum": Contender(lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9), 1e-2, 1e-3),
    "adagrad": Contender(lambda model, lr: torch.optim.Adagrad(model.parameters(), lr), 3e-2, 1e-2),
    "rmsprop": Contender(lambda model, lr: torch.optim.RMSprop(model.parameters(), lr), 3e-3, 1e-4),
    "adam": Contender(lambda model, lr: torch.optim.Adam(model.parameters(), lr), 1e-2, 1e-4),
    "adamw": Contender(lambda model, lr: torch.optim.AdamW(model.parameters(), lr), 1e-2),
    "lion": Contender(_from_library("Lion"), 1e-3, library=_LIBRARY),
    "muon": Contender(_muon, 1e-2, library=_LIBRARY),
    # A preconditioner for each side of a matrix but that of the 784 pixels, whose eigenvectors cost more than the rest.
    "soap": Contender(_from_library("SOAP", max_precondition_dim=128), 1e-2, library=_LIBRARY),
}


def require(names: list[str]) -> None:
    """Raises an `ExperimentError` where the package of one of the optimizers is not installed."""
    missing = [name for name in names if importlib.util.find_spec(OPTIMIZERS[name].library) is None]
    if missing:
        raise ExperimentError(
            f"{', '.join(missing)}: needs {OPTIMIZERS[missing[0]].library}, pip install 'metateleport[second-order]', "
            f"or take another with only="
        )


def best_step_size(score: Callable[[float], float], start: float) -> float:
    """The step size of the lowest score on a geometric grid around `start`, extended while the best is at its end.

    Args:
        score: of a step size, lower is better.
        start: the middle of the first three.

    Example:
        >>> best_step_size(lambda step: abs(step - 27.0), 1.0)
        27.0
    """
    scores = {rung: score(start * FACTOR**rung) for rung in (-1, 0, 1)}
    for _ in range(FURTHEST):
        best = min(scores, key=lambda rung: scores[rung])
        if min(scores) < best < max(scores):
            break
        further = best + (1 if best == max(scores) else -1)
        scores[further] = score(start * FACTOR**further)
    return start * FACTOR ** min(scores, key=lambda rung: scores[rung])
