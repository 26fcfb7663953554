"""Failures of a teleport that show only in the steps after it."""

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

# Fewer losses than this, before or after a teleport, give no slope that is worth comparing.
_FEWEST = 4
# A smaller growth of the rate of descent than this counts as no gain.
_LEAST_GAIN = 1e-6


class Judge:
    """Compares how fast the loss falls after a teleport with how fast it fell before.

    Losses are kept as tensors and read only when the teleport is judged, so that no step waits for the device.

    Args:
        window: number of steps that are compared, before and after the teleport each.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._before: list[Tensor] = []
        self._losses: collections.deque[Tensor] = collections.deque(maxlen=window + 1)
        self.waiting = False

    def see(self, loss: Tensor | None) -> None:
        """Notes the loss that a step started from; None where it is not known."""
        if loss is not None:
            self._losses.append(loss.detach())

    def start(self) -> None:
        """Notes that a teleport takes place now: losses seen from here on count as those after it."""
        self._before = list(self._losses)
        self._losses.clear()
        self.waiting = True

    @property
    def ripe(self) -> bool:
        """Whether a whole window has been seen since the teleport."""
        return self.waiting and len(self._losses) > self.window

    def verdict(self, report: TeleportReport, held_out: Callable[[], float]) -> TeleportReport:
        """The report of the teleport with the failures that have shown since. A teleport is judged once.

        Args:
            report: the teleport's report.
            held_out: evaluates the held-out loss now; it returns NaN where there is no held-out data.
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
    """Change per step, by least squares.

    Example:
        >>> slope([4.0, 3.0, 2.0, 1.0])
        -1.0
    """
    middle = (len(values) - 1) / 2
    return sum((place - middle) * value for place, value in enumerate(values)) / sum(
        (place - middle) ** 2 for place in range(len(values))
    )


def _no_gain(before: Sequence[float], after: Sequence[float]) -> str:
    """A sentence if the loss fell no faster after a teleport than before; empty if it fell faster."""
    steps, what, least = len(after) - 1, "loss", _LEAST_GAIN * max(abs(loss) for loss in after)
    if not all(math.isfinite(loss) for loss in after):
        return f"the loss was not finite within {steps} steps after it"
    # Under linear convergence the logarithm of the loss is a straight line.
    if min(*before, *after) > 0:
        what, least = "log of the loss", _LEAST_GAIN
        before, after = [math.log(loss) for loss in before], [math.log(loss) for loss in after]
    if len(before) < _FEWEST or not all(math.isfinite(loss) for loss in before):
        return f"the loss did not fall in the {steps} steps after it" if slope(after) > -least else ""
    if slope(after) < slope(before) - least:
        return ""
    return f"the {what} changed by {slope(after):.2g} a step after it, by {slope(before):.2g} before"
