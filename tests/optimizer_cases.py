"""One of every kind of optimizer, made for a model, shared by the tests of teleports between steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

Make = Callable[[nn.Module, float], torch.optim.Optimizer]
"""Makes an optimizer for a model, at a multiple of a step size that suits small models."""


def _muon(model: nn.Module, scale: float) -> torch.optim.Optimizer:
    """torch's own where all parameters are matrices, else that of pytorch_optimizer, with AdamW for the others."""
    from_torch = getattr(torch.optim, "Muon", None)
    if from_torch is not None and all(value.ndim == 2 for value in model.parameters()):
        return from_torch(model.parameters(), lr=1e-3 * scale, weight_decay=0.0)
    library = pytest.importorskip("pytorch_optimizer")
    matrices = [value for value in model.parameters() if value.ndim >= 2]
    others = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": matrices, "use_muon": True, "lr": 1e-3 * scale}]
    groups += [{"params": others, "use_muon": False, "lr": 1e-3 * scale}]
    return library.Muon([group for group in groups if group["params"]])


def _library(name: str, **settings: object) -> Make:
    def make(model: nn.Module, scale: float) -> torch.optim.Optimizer:
        library = pytest.importorskip("pytorch_optimizer")
        given = {**settings, "lr": float(settings["lr"]) * scale}  # type: ignore[arg-type]
        return getattr(library, name)(model.parameters(), **given)

    return make


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda model, scale: torch.optim.SGD(model.parameters(), lr=3e-4 * scale),
    "momentum": lambda model, scale: torch.optim.SGD(model.parameters(), lr=1e-4 * scale, momentum=0.9),
    "nesterov": lambda model, scale: torch.optim.SGD(model.parameters(), lr=1e-4 * scale, momentum=0.9, nesterov=True),
    "adagrad": lambda model, scale: torch.optim.Adagrad(model.parameters(), lr=1e-2 * scale),
    "rmsprop": lambda model, scale: torch.optim.RMSprop(model.parameters(), lr=3e-4 * scale, eps=1e-14),
    "rmsprop, centred, momentum": lambda model, scale: torch.optim.RMSprop(
        model.parameters(), lr=1e-4 * scale, momentum=0.5, centered=True, eps=1e-14
    ),
    "adam": lambda model, scale: torch.optim.Adam(model.parameters(), lr=1e-3 * scale),
    "adamw, amsgrad": lambda model, scale: torch.optim.AdamW(
        model.parameters(), lr=1e-3 * scale, weight_decay=1e-2, amsgrad=True
    ),
    "muon": _muon,
    "lion": _library("Lion", lr=3e-4),
    "shampoo": _library("Shampoo", lr=1e-2, momentum=0.5),
    "soap": _library("SOAP", lr=3e-4),
    # Without a line search it diverges within 200 steps on some models, teleports or none.
    "lbfgs": lambda model, scale: torch.optim.LBFGS(
        model.parameters(), lr=0.1 * scale, max_iter=2, history_size=3, line_search_fn="strong_wolfe"
    ),
}

FIRST_ORDER = ("sgd", "momentum", "nesterov", "muon", "lion")
"""Optimizers that remember sums of gradients alone, where all parameters are matrices."""
DIAGONAL = ("adagrad", "rmsprop", "rmsprop, centred, momentum", "adam", "adamw, amsgrad")
"""Those that remember sums of squares too, entry by entry."""
