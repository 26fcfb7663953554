"""How far a meta-training has come, and what a later run needs to go on with it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

__all__ = ["Progression", "Snapshot"]


@dataclasses.dataclass
class Progression:
    """How far a meta-training has come; plain numbers, so that it can be written as JSON.

    Args:
        meta_step: meta-steps taken.
        stack: number of the next training stack.
        skipped: meta-steps left out because something was not finite.
        seconds: seconds of training so far.
        best: validation score of the chosen networks.
        best_step: the meta-step they are from.
        meta_losses: the meta-loss of each meta-step.
        validations: `[meta-step, score]` pairs.
        returns: how often training went back to the best networks.
        start: which of the starts is under way; the number of starts once the best of them goes on.
        starts: the best validation score of each start tried.
        openness: how far teleports and gauges were open in each meta-step, between 0 and 1; empty where there are none.
        best_openness: the same of the chosen networks on the validation tasks.
        searched: the score of each round of the search for constants.
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


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A meta-training between two stacks: tensors by name, the progression as plain values, and the best start yet."""

    tensors: dict[str, Tensor]
    progression: dict[str, Any]
    kept: Snapshot | None = None
