"""The progress of a meta-training, and the snapshot that it is resumed from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

__all__ = ["Progression", "Snapshot"]


@dataclasses.dataclass
class Progression:
    """The progress of a meta-training, as plain numbers that can be written as JSON.

    Args:
        meta_step: meta-steps taken.
        stack: number of the next training stack.
        skipped: meta-steps left out because their losses or gradients were not finite.
        seconds: seconds of training so far.
        best: validation score of the chosen networks.
        best_step: the meta-step that the chosen networks are from.
        meta_losses: the meta-loss of each meta-step.
        validations: `[meta-step, score]` pairs.
        returns: how many times training went back to the best networks.
        start: index of the start that is being tried; the number of starts once the best one goes on.
        starts: the best validation score of each start tried.
        openness: mean openness of teleports and gauges in each meta-step, between 0 and 1; empty without teleports.
        best_openness: mean openness of the chosen networks on the validation tasks.
        searched: the score of each round of the search for constants.
        scored_steps: inner steps that scores follow their tasks for, where the time is limited; zero before the first
            score, and where the time is not limited, as then it is the horizon.
    """

    meta_step: int = 0
    stack: int = 0
    skipped: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    meta_losses: list[float] = dataclasses.field(default_factory=list)
    validations: list[list[float]] = dataclasses.field(default_factory=list)
    returns: int = 0
    start: int = 0
    starts: list[float] = dataclasses.field(default_factory=list)
    openness: list[float] = dataclasses.field(default_factory=list)
    best_openness: float = 0.0
    searched: list[float] = dataclasses.field(default_factory=list)
    scored_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of a meta-training between two stacks.

    Args:
        tensors: networks and Adam's state, by name.
        progression: the progression as plain values.
        kept: the snapshot of the best start so far, if several are tried.
    """

    tensors: dict[str, Tensor]
    progression: dict[str, Any]
    kept: Snapshot | None = None
