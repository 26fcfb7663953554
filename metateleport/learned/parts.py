"""What a meta-optimizer may have beside its update rule: a teleport that stays, and a gauge."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from metateleport.settings import ABOVE_ONE, AT_LEAST_ONE, Range, Settings, setting

__all__ = ["GaugeSettings", "TeleportSettings"]


@dataclasses.dataclass(frozen=True)
class TeleportSettings(Settings):
    """A learned teleport that stays: the model moves along its orbit (`LearnedTeleporter`).

    Args:
        hidden: units of the LSTM of each kind of group.
        max_stretch: the largest factor by which all teleports together may stretch or shrink anything, above one, so
            that they do not lead ever further along the orbit; None for no bound.

    Example:
        >>> TeleportSettings(max_stretch=2).table()
        {'hidden': 32, 'max_stretch': 2.0}
    """

    part: ClassVar[str] = "teleport"

    hidden: int = setting(32, AT_LEAST_ONE)
    max_stretch: float | None = setting(None, ABOVE_ONE)


@dataclasses.dataclass(frozen=True)
class GaugeSettings(Settings):
    """A learned gauge for each tensor, in which its step is taken and which is undone after it (`LearnedGauge`).

    Args:
        kind: `exact` along exact symmetries, `linearised` along pairs of linear layers too, with what stands between
            them taken as linear.
        hidden: units of the LSTM of each kind of group.
        metric_memory: of the running mean that a gauge's metric is on minibatches, in [0, 1): long against their noise,
            short where the metric moves with the weights, as along the factors of a product.

    Example:
        >>> GaugeSettings("exact").metric_memory
        0.95
    """

    part: ClassVar[str] = "gauge"

    kind: Literal["exact", "linearised"] = setting()
    hidden: int = setting(32, AT_LEAST_ONE)
    metric_memory: float = setting(0.95, Range("in [0, 1)", lambda value: 0 <= value < 1))
