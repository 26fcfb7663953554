"""Teleporters choose the group element. The hand-designed ones are here, the learned one is in `learned`."""

from metateleport.teleporters.base import Move, Teleporter, TrustRegion, travel
from metateleport.teleporters.failures import FAILURES
from metateleport.teleporters.free import FreeTeleporter
from metateleport.teleporters.gradient_ascent import GradientAscentTeleporter
from metateleport.teleporters.level_set import LevelSetTeleporter
from metateleport.teleporters.null_space import NullSpaceTeleporter
from metateleport.teleporters.once import teleport
from metateleport.teleporters.report import TeleportReport, failures_of, gain_of, summary_of
from metateleport.teleporters.simple import NoTeleport, RandomTeleporter
from metateleport.teleporters.whitening import WhiteningTeleporter

__all__ = [
    "FAILURES",
    "FreeTeleporter",
    "GradientAscentTeleporter",
    "LevelSetTeleporter",
    "Move",
    "NoTeleport",
    "NullSpaceTeleporter",
    "RandomTeleporter",
    "TeleportReport",
    "Teleporter",
    "TrustRegion",
    "WhiteningTeleporter",
    "failures_of",
    "gain_of",
    "summary_of",
    "teleport",
    "travel",
]
