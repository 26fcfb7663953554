"""Failures of a teleport that show only while training goes on."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.teleporters.failures import NO_GAIN, WORSE_HELD_OUT, add_failure, held_out_failure
from metateleport.teleporters.report import TeleportReport

__all__ = ["Judge", "held_out_loss", "slope"]

# Fewer losses than this on one side of a teleport have no slope worth comparing.
_FEWEST = 4
# A rate of descent that grows by less than this is no gain.
_LEAST_GAIN = 1e-6


class Judge:
    """Compares what training did after a teleport with what it did before.

    Losses are kept as tensors and looked at only when judged, so that a step waits for no device.

    Args:
        window: number of steps looked at on either side.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._before: list[Tensor] = []
        self._losses: collections.deque[Tensor] = collections.deque(maxlen=window + 1)
        self.waiting = False

    def see(self, loss: Tensor | None) -> None:
        """Is told the loss that a step started from; None where it is not known."""
        if loss is not None:
            self._losses.append(loss.detach())

    def start(self) -> None:
        """The next loss that is seen is the first after a teleport; those so far stand before it."""
        self._before = list(self._losses)
        self._losses.clear()
        self.waiting = True

    @property
    def ripe(self) -> bool:
        """Whether a whole window has been seen since the teleport."""
        return self.waiting and len(self._losses) > self.window

    def verdict(self, report: TeleportReport, held_out: Callable[[], float]) -> TeleportReport:
        """The report of the teleport with what has been seen since; it is judged only once.

        Args:
            report: of the teleport.
            held_out: evaluates the held-out loss now; NaN where there is none.
        """
        if not self.waiting:
            return report
        self.waiting = False
        found = dict(report.failures)
        after = [float(loss) for loss in self._losses]
        if len(after) >= _FEWEST:
            before = [float(loss) for loss in self._before] + after[:1]
            found = add_failure(found, NO_GAIN, _no_gain(before, after))
        if WORSE_HELD_OUT not in found:
            worse = held_out_failure(report.held_out_before, held_out(), f"{len(after)} steps after it")
            found = add_failure(found, WORSE_HELD_OUT, worse)
        return dataclasses.replace(report, failures=found)


def held_out_loss(function: Callable[[], Any] | None, model: nn.Module) -> float:
    """A user's held-out loss, without gradients; the model's modes and the random numbers are left as they were."""
    if function is None:
        return math.nan
    modes = [(module, module.training) for module in model.modules()]
    devices = {value.device for value in model.parameters() if value.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            return float(function())
    finally:
        for module, training in modes:
            module.training = training


def slope(values: Sequence[float]) -> float:
    """Change in one step, by least squares.

    Example:
        >>> slope([4.0, 3.0, 2.0, 1.0])
        -1.0
    """
    middle = (len(values) - 1) / 2
    return sum((place - middle) * value for place, value in enumerate(values)) / sum(
        (place - middle) ** 2 for place in range(len(values))
    )


def _no_gain(before: Sequence[float], after: Sequence[float]) -> str:
    """That the loss fell no faster after a teleport than before, in words; empty if it did."""
    steps, what, least = len(after) - 1, "loss", _LEAST_GAIN * max(abs(loss) for loss in after)
    if not all(math.isfinite(loss) for loss in after):
        return f"the loss was not finite within {steps} steps after it"
    # Linear convergence is a straight line in logs.
    if min(*before, *after) > 0:
        what, least = "log of the loss", _LEAST_GAIN
        before, after = [math.log(loss) for loss in before], [math.log(loss) for loss in after]
    if len(before) < _FEWEST or not all(math.isfinite(loss) for loss in before):
        return f"the loss did not fall in the {steps} steps after it" if slope(after) > -least else ""
    if slope(after) < slope(before) - least:
        return ""
    return f"the {what} changed by {slope(after):.2g} a step after it, by {slope(before):.2g} before"
