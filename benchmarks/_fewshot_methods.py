"""The meta-learners of the few-shot comparison."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from metateleport import (
    GradientAscentTeleporter,
    NoTeleport,
    RandomTeleporter,
    Symmetry,
    Teleporter,
    WhiteningTeleporter,
    load,
)
from metateleport.fewshot import (
    TeleportingLearner,
    TeleportingMAML,
    TeleportingMetaSGD,
    maml,
    meta_curvature,
    meta_sgd,
)

__all__ = ["METHODS", "Meta", "base_of", "build", "standing", "switched_off"]


@dataclasses.dataclass(frozen=True)
class Meta:
    """The settings of one learner.

    Args:
        name: a key of `METHODS`.
        lr: inner learning rate.
        seed: meta-seed.
        size: norm of the generator of a random teleport.
    """

    name: str
    lr: float
    seed: int
    size: float


_TELEPORTERS: dict[str, Callable[[Meta], Teleporter]] = {
    "ascent": lambda _: GradientAscentTeleporter(steps=2, step_size=0.2, cap=0.5),
    "descent": lambda _: GradientAscentTeleporter(steps=2, step_size=0.2, cap=0.5, direction="descent"),
    "random": lambda meta: RandomTeleporter(size=meta.size, seed=meta.seed),
    "whitening": lambda _: WhiteningTeleporter("features", damping=1e-3),
    "balanced": lambda _: WhiteningTeleporter("balanced", damping=1e-3),
    "learned": lambda _: load("digits"),
}

METHODS: dict[str, str] = {
    "maml": "MAML",
    "maml+ascent": "MAML, ascent on the gradient norm before every step",
    "maml+descent": "MAML, descent on the gradient norm before every step",
    "maml+random": "MAML, a random element of the ascent's mean size",
    "maml+whitening": "MAML, whitened features",
    "maml+balanced": "MAML, balanced factors",
    "maml+learned": "MAML, the shipped teleporter `digits` (rescaling only)",
    "meta-sgd": "Meta-SGD",
    "meta-sgd+ascent": "Meta-SGD, ascent on the gradient norm before every step",
    "meta-curvature": "Meta-Curvature",
}
"""The methods and their names in tables. A random element comes after the ascent that gives its size."""


def base_of(name: str) -> str:
    """The method to compare with: the same one without a teleport; MAML for methods without a teleport."""
    base, plus, _ = name.partition("+")
    return base if plus else "maml"


def build(meta: Meta, model: nn.Module, symmetries: Sequence[Symmetry]) -> Any:
    """Makes a learner around a model at its start."""
    base, plus, teleporter = meta.name.partition("+")
    if not plus:
        plain = {"maml": maml, "meta-sgd": meta_sgd, "meta-curvature": meta_curvature}
        return plain[base](model, meta.lr)
    kind = {"maml": TeleportingMAML, "meta-sgd": TeleportingMetaSGD}[base]
    return kind(model, meta.lr, _TELEPORTERS[teleporter](meta), symmetries)


def switched_off(learner: TeleportingLearner) -> TeleportingLearner:
    """A learner with the same start and rates that adapts without a teleport."""
    return TeleportingLearner(copy.deepcopy(learner.learner), NoTeleport(), learner.symmetries)


def standing(learner: TeleportingLearner) -> TeleportingLearner:
    """A learner with the same start and teleporter and inner learning rates of zero: it teleports and does not step."""
    still = copy.deepcopy(learner.learner)
    if hasattr(still, "lrs"):
        with torch.no_grad():
            for rate in still.lrs:
                rate.zero_()
    else:
        still.lr = 0.0
    return TeleportingLearner(still, learner.teleporter, learner.symmetries)
