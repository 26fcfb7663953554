"""Settings of the parts that a meta-optimizer may have beside its update rule: a teleport that stays, and a gauge."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from metateleport.settings import ABOVE_ONE, AT_LEAST_ONE, Range, Settings, setting

__all__ = ["UNITS", "GaugeSettings", "TeleportSettings"]

UNITS = 2048
"""Largest number of units of an LSTM; more would take gigabytes."""


@dataclasses.dataclass(frozen=True)
class TeleportSettings(Settings):
    """A learned teleport that stays: the model moves along its orbit (`LearnedTeleporter`).

    Args:
        hidden: units of the LSTM of each kind of group.
        max_stretch: the largest factor, above one, by which all teleports together may stretch or shrink anything;
            None for no bound.

    Example:
        >>> TeleportSettings(max_stretch=2).table()
        {'hidden': 32, 'max_stretch': 2.0}
    """

    part: ClassVar[str] = "teleport"

    hidden: int = setting(32, AT_LEAST_ONE, UNITS)
    max_stretch: float | None = setting(None, ABOVE_ONE, 1e30)


@dataclasses.dataclass(frozen=True)
class GaugeSettings(Settings):
    """A learned gauge for each tensor: the step is taken in it, and it is undone after the step (`LearnedGauge`).

    Args:
        kind: `exact` for gauges along exact symmetries; `linearised` for gauges along pairs of linear layers too, as
            if the activation between them were linear.
        hidden: units of the LSTM of each kind of group.
        metric_memory: share of the metric's running mean that is kept at each step on minibatches, in [0, 1). A long
            memory averages over their noise; a short one follows a metric that changes with the weights, as for the
            factors of a product.

    Example:
        >>> GaugeSettings("exact").metric_memory
        0.95
    """

    part: ClassVar[str] = "gauge"

    kind: Literal["exact", "linearised"] = setting()
    hidden: int = setting(32, AT_LEAST_ONE, UNITS)
    metric_memory: float = setting(0.95, Range("in [0, 1)", lambda value: 0 <= value < 1))
